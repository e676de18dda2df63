//! Files that hold a secret: a key or password that nobody but their owner may read.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::local::state::write_private;

/// Reads a secret. One that others on the machine may read is none, so it is refused.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let reading = || format!("reading {}", path.display());
    let mode = std::fs::metadata(path).with_context(reading)?.permissions().mode();
    anyhow::ensure!(
        mode & 0o077 == 0,
        "others may read {} (mode {:o}): `chmod 600` it, and replace the secret if anyone may have",
        path.display(),
        mode & 0o777
    );
    std::fs::read(path).with_context(reading)
}

/// Reads a secret that is text.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| anyhow::anyhow!("{} is no text", path.display()))
}

/// Reads a secret, or makes it where there is none yet.
pub fn read_or_make(path: &Path, make: impl FnOnce() -> anyhow::Result<Vec<u8>>) -> anyhow::Result<Vec<u8>> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let made = make()?;
            write_private(path, &made)?;
            Ok(made)
        }
        _ => read(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_made_once_and_refused_when_others_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(read(&path).unwrap_err().to_string().contains("reading"));
        assert_eq!(read_or_make(&path, || Ok(b"one".to_vec())).unwrap(), b"one");
        assert_eq!(read_or_make(&path, || unreachable!()).unwrap(), b"one");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for mode in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let refused = read_or_make(&path, || unreachable!()).unwrap_err().to_string();
            assert!(refused.contains("chmod 600"), "{refused}");
        }
    }

    #[test]
    fn a_link_to_nowhere_is_not_taken_for_a_secret_to_make() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::os::unix::fs::symlink(dir.path().join("unmounted"), &path).unwrap();
        assert!(read_or_make(&path, || unreachable!()).is_err());
    }
}
