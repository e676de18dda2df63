//! The embedded engine: a replicated log inside the servers themselves.
