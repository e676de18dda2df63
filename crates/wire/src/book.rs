//! Where the servers are: what was configured, and what servers told since, kept on disk.
//!
//! What was told last wins, so that an agent or gateway follows every change of the control plane and, started again with
//! every server of its configuration gone, still finds the others. The configured ones are asked too, but later: they may
//! be all that is left, or long removed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nexus_env::{Disk, Endpoint, write_atomic};

const FILE: &str = "servers";
const HEAD: &str = "nexus servers 1";
/// More servers than a region ever has.
const MANY: usize = 64;

/// The servers that are known.
#[derive(Debug)]
pub struct ServerBook {
    configured: Vec<Endpoint>,
    told: Mutex<Arc<[Endpoint]>>,
    path: Option<PathBuf>,
}

impl ServerBook {
    /// A book that is not kept.
    pub fn new(configured: Vec<Endpoint>) -> Self {
        Self { configured, told: Mutex::new([].into()), path: None }
    }

    /// The book that is kept in a folder. Blocks. What can't be read is as good as nothing: the configuration still counts.
    pub fn open(disk: &dyn Disk, dir: &Path, configured: Vec<Endpoint>) -> Self {
        let path = dir.join(FILE);
        let text = disk.read(&path).ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        let mut lines = text.lines();
        let told: Vec<Endpoint> = match lines.next() {
            Some(HEAD) => lines.take(MANY).filter_map(|l| l.parse().ok()).collect(),
            _ => Vec::new(),
        };
        Self { configured, told: Mutex::new(told.into()), path: Some(path) }
    }

    fn told(&self) -> Arc<[Endpoint]> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over what a server told; says whether that is news. Text that is no endpoint is passed over, and so is an
    /// empty list: there is always some server.
    pub fn learn(&self, servers: &[String]) -> bool {
        let mut told: Vec<Endpoint> = servers.iter().take(MANY).filter_map(|s| s.parse().ok()).collect();
        told.sort();
        told.dedup();
        let mut held = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_empty() || **held == *told {
            return false;
        }
        *held = told.into();
        true
    }

    /// Writes down what was told last. Blocks.
    pub fn save(&self, disk: &dyn Disk) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut text = HEAD.to_owned();
        for endpoint in self.told().iter() {
            text.push('\n');
            text.push_str(&endpoint.to_string());
        }
        text.push('\n');
        if let Some(dir) = path.parent() {
            disk.create_dir_all(dir)?;
        }
        write_atomic(disk, path, text.as_bytes())
    }

    /// All that are known, the likeliest first.
    pub fn all(&self) -> Vec<Endpoint> {
        let mut all = self.told().to_vec();
        for endpoint in &self.configured {
            if !all.contains(endpoint) {
                all.push(endpoint.clone());
            }
        }
        all
    }

    /// The `n`th server to try, in an order that goes round: twice those that were told, then the others once.
    pub fn nth(&self, n: usize) -> Option<Endpoint> {
        let (all, told) = (self.all(), self.told().len());
        let turn = n.checked_rem(told + all.len())?;
        if turn < 2 * told { all.get(turn % told).cloned() } else { all.get(turn - told).cloned() }
    }
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;

    use super::*;

    fn endpoint(n: u8) -> Endpoint {
        format!("10.0.0.{n}:7440").parse().unwrap()
    }

    fn texts(numbers: &[u8]) -> Vec<String> {
        numbers.iter().map(|n| endpoint(*n).to_string()).collect()
    }

    #[test]
    fn what_is_told_comes_first_and_what_is_configured_is_not_forgotten() {
        let book = ServerBook::new(vec![endpoint(1), endpoint(2)]);
        assert_eq!(book.nth(3), Some(endpoint(2)));
        assert!(book.learn(&texts(&[2, 3, 4])));
        assert!(!book.learn(&texts(&[4, 3, 2])), "the order is no news");
        assert!(!book.learn(&[]) && !book.learn(&["garbage".into()]));
        assert_eq!(book.all(), [2, 3, 4, 1].map(endpoint));
        let tried: Vec<_> = (0..8).map(|n| book.nth(n).unwrap()).collect();
        assert_eq!(tried, [2, 3, 4, 2, 3, 4, 1, 2].map(endpoint));
        assert_eq!(ServerBook::new(Vec::new()).nth(5), None);
    }

    #[test]
    fn it_is_still_known_after_a_restart() {
        let disk = MemDisk::new(7);
        let dir = Path::new("/data");
        let book = ServerBook::open(&disk, dir, vec![endpoint(1)]);
        assert!(book.learn(&texts(&[3, 4])));
        book.save(&disk).unwrap();
        assert_eq!(ServerBook::open(&disk, dir, vec![endpoint(1)]).all(), [3, 4, 1].map(endpoint));
        write_atomic(&disk, &dir.join(FILE), b"something else\n10.0.0.9:1").unwrap();
        assert_eq!(ServerBook::open(&disk, dir, vec![endpoint(1)]).all(), [endpoint(1)]);
    }
}
