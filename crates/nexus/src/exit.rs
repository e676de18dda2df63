//! How the program ends: the stable exit codes that scripts rely on.

use std::fmt;

/// The help text that documents the codes.
pub const HELP: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 conflict or precondition not met, \
                        5 unavailable or timed out.";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Unavailable = 5,
}

/// An error that knows its exit code. Wrapped in `anyhow`, it is found again by [`code_of`] below any context.
#[derive(Debug)]
pub struct Fail {
    pub exit: Exit,
    pub message: String,
}

impl Fail {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Exit::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Exit::Conflict, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Exit::Unavailable, message)
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fail {}

/// The exit code of an error.
pub fn code_of(error: &anyhow::Error) -> i32 {
    let found = error.chain().find_map(|e| {
        let own = e.downcast_ref::<Fail>().map(|f| f.exit);
        own.or_else(|| e.downcast_ref::<crate::client::ClientError>().map(|c| c.exit()))
    });
    found.unwrap_or(Exit::Failed) as i32
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_code_survives_context() {
        let error = Err::<(), _>(Fail::conflict("taken")).context("creating it").unwrap_err();
        assert_eq!(code_of(&error), 4);
        assert_eq!(code_of(&anyhow::anyhow!("other")), 1);
    }
}
