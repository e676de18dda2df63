//! Addresses, links and routes of hosts and instances.
