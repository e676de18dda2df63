//! Where the command line finds its cloud: a small file that `nexus up` writes, and two variables that override it.
//!
//! `$NEXUS_CONFIG`, or `~/.config/nexus/context.json`. `CNX_URL` (one or more, separated by commas) and `CNX_TOKEN` win
//! over the file, so that a script can go elsewhere without touching it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nexus_model::Name;
use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::exit::Fail;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Context {
    /// Every server's API, nearest first.
    pub endpoints: Vec<String>,
    /// The authority to trust, in PEM; without it, the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The file that holds the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The file of the session that `nexus login` opened; it goes before the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_file: Option<PathBuf>,
    pub region: Name,
    pub project: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<Name>,
    /// The data folder of the local cloud that this context belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
}

/// The file's path.
pub fn path() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("NEXUS_CONFIG").filter(|p| !p.is_empty()) {
        return Ok(path.into());
    }
    if let Some(user) = sudo_user() {
        return Ok(user.dir.join(".config/nexus/context.json"));
    }
    let base = match std::env::var_os("XDG_CONFIG_HOME").filter(|p| !p.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => crate::local::home()?.join(".config"),
    };
    Ok(base.join("nexus/context.json"))
}

/// Reads the file; `None` when there is none.
pub fn read() -> anyhow::Result<Option<Context>> {
    read_from(&path()?)
}

fn read_from(path: &Path) -> anyhow::Result<Option<Context>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
    };
    serde_json::from_str(&text).map(Some).with_context(|| {
        format!("{} is damaged; `nexus up` writes it anew, or name another with NEXUS_CONFIG", path.display())
    })
}

/// Writes the file, readable by its owner only. Under sudo, that owner is the user who called it, who then gets copies
/// of the token and of the authority's certificate beside it, because the cloud's own folder is root's.
pub fn write(context: &Context) -> anyhow::Result<PathBuf> {
    let Some(user) = sudo_user() else {
        let path = path()?;
        write_files(&path, context, None)?;
        return Ok(path);
    };
    let path = path()?;
    let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
    let mut own = context.clone();
    for (file, name) in [(&mut own.ca, "ca.pem"), (&mut own.token_file, "token")] {
        if let Some(path) = file {
            let bytes = std::fs::read(&*path).with_context(|| format!("reading {}", path.display()))?;
            *path = folder.join(name);
            make_folder(&folder, Some(&user))?;
            write_owned(path, &bytes, Some(&user))?;
        }
    }
    write_files(&path, &own, Some(&user))?;
    Ok(path)
}

/// The user who called sudo, if that is how this process became root.
fn sudo_user() -> Option<User> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let id: u32 = std::env::var("SUDO_UID").ok()?.parse().ok()?;
    User::from_uid(Uid::from_raw(id)).ok()?.filter(|u| !u.uid.is_root())
}

fn write_files(path: &Path, context: &Context, owner: Option<&User>) -> anyhow::Result<()> {
    make_folder(path.parent().unwrap_or(Path::new("/")), owner)?;
    let json = serde_json::to_vec_pretty(context).expect("a context is plain data");
    write_owned(path, &json, owner)
}

fn make_folder(folder: &Path, owner: Option<&User>) -> anyhow::Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|f| !f.exists()).collect();
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    missing.into_iter().try_for_each(|made| give(made, owner))
}

fn write_owned(path: &Path, bytes: &[u8], owner: Option<&User>) -> anyhow::Result<()> {
    crate::local::state::write_private(path, bytes)?;
    give(path, owner)
}

fn give(path: &Path, owner: Option<&User>) -> anyhow::Result<()> {
    let Some(user) = owner else { return Ok(()) };
    nix::unistd::chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("giving away {}", path.display()))
}

/// Removes the file if it belongs to the cloud in `data_dir`.
pub fn forget(data_dir: &Path) -> anyhow::Result<()> {
    let Some(context) = read().ok().flatten().filter(|c| c.data_dir.as_deref() == Some(data_dir)) else {
        return Ok(());
    };
    let path = path()?;
    // Copies that were made for a user of sudo stand beside the context; others go with the data folder.
    let copies = [context.ca, context.token_file, context.session_file]
        .into_iter()
        .flatten()
        .filter(|f| f.parent() == path.parent());
    for file in copies.chain([path.clone()]) {
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What a client needs, after the variables had their say.
#[derive(Debug, Clone)]
pub struct Target {
    pub endpoints: Vec<String>,
    /// In PEM.
    pub ca: Option<String>,
    pub token: Option<String>,
    /// The file of a session, in place of a token.
    pub session: Option<PathBuf>,
    pub region: Name,
    pub project: Name,
    pub organization: Name,
}

/// The organization that every fleet begins with.
pub fn default_organization() -> Name {
    "default".parse().expect("a well-formed name")
}

/// Finds the cloud to talk to.
pub fn target() -> anyhow::Result<Target> {
    Ok(target_of(None)?.0)
}

/// Finds the cloud to talk to by the file given, or else the usual one; also tells the data folder of the local cloud
/// that the file belongs to. A file that was asked for by name must exist.
pub fn target_of(file: Option<&Path>) -> anyhow::Result<(Target, Option<PathBuf>)> {
    let variable = |name| std::env::var(name).ok().filter(|v: &String| !v.trim().is_empty());
    let url = variable("CNX_URL");
    let context = match file {
        Some(file) => {
            let missing = || Fail::not_found(format!("the context {} does not exist", file.display()));
            Some(read_from(file)?.ok_or_else(missing)?)
        }
        None => read()?,
    };
    // An address of the user's own need not be that of the local cloud.
    let data_dir = context.as_ref().filter(|_| url.is_none()).and_then(|c| c.data_dir.clone());
    if context.is_none() && url.is_none() {
        return Err(Fail::not_found(format!(
            "there is no cloud to talk to: {} does not exist and CNX_URL is not set. `nexus up` starts a local cloud",
            path()?.display()
        ))
        .into());
    }
    let default = |name: &str| name.parse::<Name>().expect("a well-formed name");
    let (mut target, (token_file, session_file), ca_file) = match context {
        Some(c) => {
            let organization = c.organization.unwrap_or_else(default_organization);
            let (endpoints, region, project) = (c.endpoints, c.region, c.project);
            let target = Target { endpoints, ca: None, token: None, session: None, region, project, organization };
            (target, (c.token_file, c.session_file), c.ca)
        }
        None => {
            let (region, project) = (default("local"), default("default"));
            let organization = default_organization();
            let target =
                Target { endpoints: Vec::new(), ca: None, token: None, session: None, region, project, organization };
            (target, (None, None), None)
        }
    };
    if let Some(url) = url {
        target.endpoints = url.split(',').map(|u| u.trim().trim_end_matches('/').to_owned()).collect();
    }
    if let Some(path) = ca_file {
        target.ca = Some(std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?);
    }
    target.token = match (variable("CNX_TOKEN"), session_file, token_file) {
        (Some(token), ..) => Some(token.trim().to_owned()),
        (None, Some(path), _) => {
            target.session = Some(path);
            None
        }
        (None, None, Some(path)) => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            Some(text.trim().to_owned())
        }
        (None, None, None) => None,
    };
    Ok((target, data_dir))
}
