//! Files that hold a secret: a key or password that nobody but their owner may read.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::local::state::write_private;

/// Bytes of a secret.
const MAX: u64 = 64 << 10;

/// Reads a secret. One that others on the machine may read is none, so it is refused.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let reading = || format!("reading {}", path.display());
    // What is looked at and what is read is the same file, whatever the name means a moment later.
    let file = File::open(path).with_context(reading)?;
    let mode = file.metadata().with_context(reading)?.permissions().mode();
    anyhow::ensure!(
        mode & 0o077 == 0,
        "others may read {} (mode {:o}): `chmod 600` it, and replace the secret if anyone may have",
        path.display(),
        mode & 0o777
    );
    let mut secret = Vec::new();
    file.take(MAX + 1).read_to_end(&mut secret).with_context(reading)?;
    anyhow::ensure!(secret.len() as u64 <= MAX, "{} has more than {MAX} bytes: it is no secret", path.display());
    Ok(secret)
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
    fn what_is_too_long_is_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        write_private(&path, &vec![b'x'; MAX as usize]).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, MAX);
        write_private(&path, &vec![b'x'; MAX as usize + 1]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn a_link_to_nowhere_is_not_taken_for_a_secret_to_make() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::os::unix::fs::symlink(dir.path().join("unmounted"), &path).unwrap();
        assert!(read_or_make(&path, || unreachable!()).is_err());
    }
}
