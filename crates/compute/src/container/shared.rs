//! The folder that the parts of an instance share: a file system of bounded size in a file, as a scratch layer is, but mounted
//! on the host, since it outlasts each of the containers that see it.
//!
//! ```text
//! shared/<instance>/image       the file, or a link to it in a storage class's folder
//! shared/<instance>/mnt         where it is mounted
//! shared/<instance>/mnt/id      tells it from one that was made anew; containers don't see it
//! shared/<instance>/mnt/folder  what containers see
//! ```
//!
//! After the host's boot nothing is mounted, and so it was lost: its file system has no journal. It is made anew then. Whatever was
//! cut off is found again by its folder, which goes last.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nexus_model::{Bytes, Name, Uid};
use nix::mount::{MntFlags, umount2};

use super::{Inner, host, scratch};
use crate::{RuntimeError, Shared};

fn file_name(instance: Uid) -> String {
    format!("nexus-{instance}-shared.img")
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// What is mounted at `mnt`, if it was made to its end.
fn found(mnt: &Path) -> Option<Shared> {
    let own = fs::metadata(mnt).ok()?.dev();
    let above = fs::metadata(mnt.parent()?).ok()?.dev();
    let id = (own != above).then(|| fs::read_to_string(mnt.join("id")).ok())??;
    Some(Shared { path: mnt.join("folder"), id })
}

/// Undoes every mount at `mnt`.
fn unmount(mnt: &Path) -> io::Result<()> {
    // Two are more than there can be; none is the usual end.
    for _ in 0..4 {
        match umount2(mnt, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::Error::other("it is mounted again and again"))
}

impl Inner {
    fn shared_dir(&self, instance: Uid) -> PathBuf {
        self.config.dir.join("shared").join(instance.to_string())
    }

    pub(super) fn share(&self, instance: Uid, size: Bytes, class: Option<&Name>) -> Result<Shared, RuntimeError> {
        let dir = self.shared_dir(instance);
        let mnt = dir.join("mnt");
        if let Some(shared) = found(&mnt) {
            return Ok(shared);
        }
        self.unshare(instance)?;
        let attempt = || host(format!("making the folder that the parts of {instance} share"));
        fs::create_dir_all(&mnt).map_err(attempt())?;
        let image = dir.join("image");
        if let Some(class) = class {
            let folder = self.config.storage.get(class).ok_or_else(|| {
                let message = format!("this host has no folder of storage class {class}");
                RuntimeError::Failed { attempt: "making the folder that parts share".into(), message }
            })?;
            fs::create_dir_all(folder).map_err(attempt())?;
            symlink(folder.join(file_name(instance)), &image).map_err(attempt())?;
        }
        scratch::reserve(&image, size.0).map_err(host(format!("reserving {size} for the folder that parts share")))?;
        scratch::mount_scratch(&image, &mnt, size.0).map_err(|failure| attempt()(io::Error::other(failure.message)))?;
        let id = format!("{}-{}", self.now(), std::process::id());
        let make = || {
            let folder = mnt.join("folder");
            fs::create_dir(&folder)?;
            // Parts may be of different users.
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777))?;
            fs::set_permissions(&mnt, fs::Permissions::from_mode(0o700))?;
            fs::write(mnt.join("id"), &id)?;
            Ok(Shared { path: folder, id: id.clone() })
        };
        make().map_err(attempt())
    }

    pub(super) fn unshare(&self, instance: Uid) -> Result<(), RuntimeError> {
        let dir = self.shared_dir(instance);
        if fs::symlink_metadata(&dir).is_err() {
            return Ok(());
        }
        let remove = || {
            unmount(&dir.join("mnt"))?;
            let image = dir.join("image");
            if let Ok(file) = fs::read_link(&image)
                && file.ends_with(file_name(instance))
            {
                gone(fs::remove_file(file))?;
            }
            gone(fs::remove_file(image))?;
            // Never what is in it: were it still mounted, that would be the tenant's.
            gone(fs::remove_dir(dir.join("mnt")))?;
            gone(fs::remove_dir(&dir))
        };
        remove().map_err(host(format!("removing the folder that the parts of {instance} shared")))
    }

    pub(super) fn shared(&self) -> Result<Vec<Uid>, RuntimeError> {
        let listed = fs::read_dir(self.config.dir.join("shared")).map_err(host("listing shared folders"))?;
        Ok(listed.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }
}
