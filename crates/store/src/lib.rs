//! The metadata store: ordered MVCC keys, transactions, watch and leases.
