//! The data folder of a local cloud: what lies where, who may use it, and how files get into it.
//!
//! ```text
//! nexus-cloud.json   the plan; also the mark that says "this folder is ours"
//! lock               held by the supervisor for its whole life
//! setup.lock         held while a command prepares, starts or tears down
//! ca/ certs/         the authority and everyone's certificates
//! token token.sha256 the administrator's token and what servers know of it
//! config/NAME.toml   of servers and gateways; config/HOST/{host,agent,keeper}.toml
//! data/NAME/         each role's own
//! logs/NAME.log      and agent@HOST.log, keeper@HOST.log, supervisor.log
//! run/NAME.stopped   the user wants it to stay down
//! run/HOST.cut       the user wants its cable to stay cut; likewise run/REGION.cut
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::plan::{self, FORMAT, Plan};
use crate::exit::Fail;

const MARKER: &str = "nexus-cloud.json";
/// A log larger than this is set aside when its writer starts.
const LOG_CAP: u64 = 16 << 20;

/// The folder of one local cloud.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
}

/// A lock on the folder; the kernel frees it when the holder ends, however that happens.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// A mark that a user set on a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Stopped,
    Cut,
}

impl Mark {
    fn suffix(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Cut => "cut",
        }
    }
}

impl DataDir {
    /// The folder at `path`, made absolute, links resolved as far as it exists. Nothing is made.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        let absolute = std::path::absolute(path).with_context(|| format!("resolving {}", path.display()))?;
        Ok(Self { root: absolute.canonicalize().unwrap_or(absolute) })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn config(&self, name: &str) -> PathBuf {
        self.root.join("config").join(format!("{name}.toml"))
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.root.join("data").join(name)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    pub fn ca(&self) -> PathBuf {
        self.root.join("ca/ca.pem")
    }

    pub fn ca_key(&self) -> PathBuf {
        self.root.join("ca/ca.key")
    }

    /// A region's authority and its key.
    pub fn region_ca(&self, region: &str) -> (PathBuf, PathBuf) {
        let file = |end: &str| self.root.join("ca").join(format!("{region}.{end}"));
        (file("pem"), file("key"))
    }

    pub fn cert(&self, name: &str) -> PathBuf {
        self.root.join("certs").join(format!("{name}.pem"))
    }

    pub fn key(&self, name: &str) -> PathBuf {
        self.root.join("certs").join(format!("{name}.key"))
    }

    pub fn token(&self) -> PathBuf {
        self.root.join("token")
    }

    /// The name of the file of master keys.
    pub const MASTER_KEYS: &'static str = "master-keys";

    pub fn master_keys(&self) -> PathBuf {
        self.root.join(Self::MASTER_KEYS)
    }

    pub fn token_hash(&self) -> PathBuf {
        self.root.join("token.sha256")
    }

    fn mark_path(&self, name: &str, mark: Mark) -> PathBuf {
        self.root.join("run").join(format!("{name}.{}", mark.suffix()))
    }

    pub fn is_marked(&self, name: &str, mark: Mark) -> bool {
        self.mark_path(name, mark).exists()
    }

    pub fn mark(&self, name: &str, mark: Mark) -> anyhow::Result<()> {
        write_private(&self.mark_path(name, mark), b"")
    }

    pub fn unmark(&self, name: &str, mark: Mark) -> anyhow::Result<()> {
        let path = self.mark_path(name, mark);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// The plan, or `None` when the folder holds no cloud yet.
    pub fn plan(&self) -> anyhow::Result<Option<Plan>> {
        let path = self.root.join(MARKER);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        let value: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
        let format = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if format > u64::from(FORMAT) {
            let version = value.get("version").and_then(|v| v.as_str()).unwrap_or("unknown");
            return Err(Fail::conflict(format!(
                "{} was made by the newer release {version} (format {format}; this one, {}, reads up to {FORMAT}): \
                 use that release, or another --data-dir",
                self.root.display(),
                env!("CARGO_PKG_VERSION"),
            ))
            .into());
        }
        serde_json::from_value(plan::migrate(value)).map(Some).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Whether exactly this plan is written there, in this release's format.
    pub fn holds(&self, plan: &Plan) -> anyhow::Result<bool> {
        let json = serde_json::to_vec_pretty(plan).expect("a plan is plain data");
        match fs::read(self.root.join(MARKER)) {
            Ok(held) => Ok(held == json),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).with_context(|| format!("reading {}", self.root.join(MARKER).display())),
        }
    }

    /// Makes the folders and writes the plan: from now on this folder is a cloud's.
    pub fn create(&self, plan: &Plan) -> anyhow::Result<()> {
        for folder in ["", "ca", "certs", "config", "data", "logs", "run"] {
            make_private_dir(&self.root.join(folder))?;
        }
        let json = serde_json::to_vec_pretty(plan).expect("a plan is plain data");
        write_private(&self.root.join(MARKER), &json)
    }

    /// Refuses a folder that holds something else.
    pub fn refuse_foreign(&self) -> anyhow::Result<()> {
        let mut entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e).with_context(|| format!("reading {}", self.root.display())),
        };
        let ours = |e: &fs::DirEntry| e.file_name() == "setup.lock" || e.file_name() == "lost+found";
        if let Some(other) = entries.find_map(|e| e.ok().filter(|e| !ours(e))) {
            return Err(Fail::conflict(format!(
                "{} is not empty and not a cloud's (it holds {:?}): choose another --data-dir",
                self.root.display(),
                other.file_name()
            ))
            .into());
        }
        Ok(())
    }

    /// Removes the folder with everything in it, if it is a cloud's. The mark goes last, so that a purge which was cut
    /// off can be repeated.
    pub fn purge(&self) -> anyhow::Result<()> {
        let marker = self.root.join(MARKER);
        if !marker.exists() {
            bail!("{} holds no {MARKER}: it is not a cloud's, nothing is removed", self.root.display());
        }
        for folder in ["ca", "certs", "config", "data", "logs", "run"] {
            remove_tree(&self.root.join(folder))?;
        }
        for file in ["token", "token.sha256", "master-keys", "lock", "setup.lock", MARKER] {
            match fs::remove_file(self.root.join(file)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("removing {file}"));
                }
                _ => {}
            }
        }
        // Anything else in it was put there by somebody else, and stays.
        fs::remove_dir(&self.root).ok();
        Ok(())
    }

    /// Takes the supervisor's lock, or says that somebody has it.
    pub fn try_lock(&self) -> anyhow::Result<Option<Lock>> {
        take(&self.root.join("lock"))
    }

    /// Takes the lock under which commands prepare and tear down, waiting for another command to end.
    pub fn setup_lock(&self, patience: Duration) -> anyhow::Result<Lock> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(lock) = take(&self.root.join("setup.lock"))? {
                return Ok(lock);
            }
            if Instant::now() > deadline {
                return Err(Fail::unavailable(format!(
                    "another command has been preparing {} for {} s",
                    self.root.display(),
                    patience.as_secs()
                ))
                .into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Opens a log to append to; one that has grown large is set aside first.
    pub fn open_log(&self, name: &str) -> anyhow::Result<File> {
        open_log(&self.log(name))
    }
}

/// Opens a log file to append to; one that has grown large is set aside first.
pub fn open_log(path: &Path) -> anyhow::Result<File> {
    if fs::metadata(path).is_ok_and(|m| m.len() > LOG_CAP) {
        let aside = path.with_extension("log.1");
        fs::rename(path, &aside).with_context(|| format!("setting {} aside", path.display()))?;
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.open(path).with_context(|| format!("opening {}", path.display()))
}

fn take(path: &Path) -> anyhow::Result<Option<Lock>> {
    if let Some(parent) = path.parent() {
        make_private_dir(parent)?;
    }
    loop {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let file = options.open(path).with_context(|| format!("opening {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
        };
        // A purge may have removed the file between the two steps: then this lock guards nothing.
        use std::os::unix::fs::MetadataExt as _;
        let same = match (lock.metadata(), fs::metadata(path)) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        };
        if same {
            return Ok(Some(Lock(lock)));
        }
    }
}

/// Makes a folder, and those above it, that only its owner can enter.
pub fn make_private_dir(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("making the folder {}", path.display()))
}

/// Writes a file that only its owner can read: whole or not at all, durable.
pub fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let work = || -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    };
    work().with_context(|| format!("writing {}", path.display()))
}

/// Removes a folder with all that is in it, also when its programs took away their own rights.
fn remove_tree(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", path.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::plan::GivenChoices;
    use super::*;

    fn cloud() -> (tempfile::TempDir, DataDir, Plan) {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::at(&temp.path().join("cloud")).unwrap();
        let plan = Plan::new(&GivenChoices::default().with_defaults(), [3; 8], |_| true).unwrap();
        (temp, dir, plan)
    }

    #[test]
    fn a_folder_is_ours_once_it_has_a_plan() {
        let (_temp, dir, plan) = cloud();
        assert!(dir.plan().unwrap().is_none());
        dir.refuse_foreign().unwrap();
        dir.create(&plan).unwrap();
        assert_eq!(dir.plan().unwrap().unwrap(), plan);
        let mode = fs::metadata(dir.root().join(MARKER)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        dir.purge().unwrap();
        assert!(!dir.root().exists());
    }

    #[test]
    fn another_programs_folder_is_neither_used_nor_purged() {
        let (_temp, dir, _) = cloud();
        fs::create_dir_all(dir.root()).unwrap();
        fs::write(dir.root().join("thesis.tex"), "x").unwrap();
        assert!(dir.refuse_foreign().unwrap_err().to_string().contains("thesis.tex"));
        assert!(dir.purge().is_err());
        assert!(dir.root().join("thesis.tex").exists());
    }

    #[test]
    fn a_newer_releases_folder_is_refused_with_its_version() {
        let (_temp, dir, plan) = cloud();
        dir.create(&Plan { format: FORMAT + 1, version: "9.9.9".into(), ..plan }).unwrap();
        let error = dir.plan().unwrap_err();
        assert!(error.to_string().contains("9.9.9"), "{error}");
        assert_eq!(crate::exit::code_of(&error), 4);
    }

    #[test]
    fn one_holder_at_a_time() {
        let (_temp, dir, plan) = cloud();
        dir.create(&plan).unwrap();
        let first = dir.try_lock().unwrap();
        assert!(first.is_some());
        assert!(dir.try_lock().unwrap().is_none());
        drop(first);
        assert!(dir.try_lock().unwrap().is_some());
    }

    #[test]
    fn a_grown_log_is_set_aside() {
        let (_temp, dir, plan) = cloud();
        dir.create(&plan).unwrap();
        dir.open_log("x").unwrap().set_len(LOG_CAP + 1).unwrap();
        assert_eq!(dir.open_log("x").unwrap().metadata().unwrap().len(), 0);
        assert!(dir.root().join("logs/x.log.1").exists());
    }
}
