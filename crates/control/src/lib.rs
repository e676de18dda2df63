//! The writer, the reconcilers, cells and quotas.
