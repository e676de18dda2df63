//! The sign-in that the command line goes on with: kept in a file beside the context, readable by its owner only.
//!
//! A refresh token is good once, and who brings one twice loses the session. So programs that run at the same time take
//! turns: whoever finds the access token old locks the file, looks again, and only then refreshes.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// An access token is fetched anew so long before it ends.
const EARLY_MS: i64 = 60_000;

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// `organization/name`
    pub user: String,
    /// Its name, by which it is ended.
    pub session: String,
    pub access_token: String,
    /// Absent from a session that was exchanged for a CI system's token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<String>,
    /// When the access token ends, in milliseconds since 1970.
    pub expires: i64,
}

/// What the token endpoint answers.
#[derive(Debug, Deserialize)]
pub struct Granted {
    access_token: String,
    #[serde(default)]
    refresh_token: Option<String>,
    expires_in: i64,
    session: String,
    organization: String,
    user: String,
}

impl Granted {
    pub fn into_session(self, now: i64) -> Session {
        Session {
            user: format!("{}/{}", self.organization, self.user),
            session: self.session,
            access_token: self.access_token,
            refresh_token: self.refresh_token,
            expires: now + self.expires_in * 1000,
        }
    }
}

impl Session {
    pub fn is_fresh(&self, now: i64) -> bool {
        now + EARLY_MS < self.expires
    }

    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged: sign in again", path.display()))
    }

    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self).expect("a session is plain data");
        crate::local::state::write_private(path, &text)
    }
}

/// Where the session of a context is kept.
pub fn path_beside(context: &Path) -> PathBuf {
    context.with_extension("session.json")
}

/// Holds the turn to refresh until it is dropped.
pub fn lock(path: &Path) -> anyhow::Result<Flock<File>> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let at = path.with_extension("lock");
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&at);
    let file = file.with_context(|| format!("opening {}", at.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| anyhow::anyhow!("locking {}: {e}", at.display()))
}
