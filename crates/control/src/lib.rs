//! The control plane of a region: one writer that takes intents in order, decides them against its own state and commits
//! them in batches; the reconcilers, cells and quotas are functions over that state.

pub mod intent;
