//! What a container sees as its root: the image's layers, read-only, under a scratch layer of bounded size.
//!
//! The scratch layer is an ext4 file system in a file on a loop device: it is on disk, its size is reserved when the
//! instance is made, and when it is full the application sees "no space left on device" and nobody else does. (The
//! alternative, a tmpfs, counts as the application's memory, so that filling it kills instead of failing; it is used
//! where the host has no loop devices or no `mkfs.ext4`.) Whatever it holds goes with the instance, so it has no journal.
//!
//! Mounts are made in a mount namespace of the shim's own, from which the container's is copied: when the container's
//! last process ends, the kernel undoes them and frees the loop device. Nothing is left to unmount, whatever crashed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Failure;

/// Room beside the content for the file system's own tables: a 32nd and 1 MiB.
fn with_tables(scratch: u64) -> u64 {
    (scratch + scratch / 32 + (1 << 20)).next_multiple_of(4096)
}

/// Reserves the scratch layer's size on the host's disk.
pub(super) fn reserve(image: &Path, scratch: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(image)?;
    let size = with_tables(scratch);
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size) {
        // A file system that can't reserve: then the size is a bound alone.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(size),
        other => other.map_err(io::Error::from),
    }
}

/// Enters a mount namespace that nothing leaks from.
pub(super) fn enter_private_mounts() -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(Failure::os("making a mount namespace"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(Failure::os("making mounts private"))
}

/// Mounts the scratch layer at `at`.
pub(super) fn mount_scratch(image: &Path, at: &Path, scratch: u64) -> Result<(), Failure> {
    let mounted = make_file_system(image).and_then(|()| mount_loop(image, at));
    let Err(loop_error) = mounted else { return Ok(()) };
    if fs::metadata("/dev/loop-control").is_ok() && loop_error.raw_os_error() != Some(libc::ENODEV) && has_mkfs() {
        return Err(Failure::io(format!("mounting the scratch layer {}", image.display()))(loop_error));
    }
    let options = format!("size={scratch},mode=0755");
    let flags = MsFlags::MS_NODEV;
    mount(Some("scratch"), at, Some("tmpfs"), flags, Some(options.as_str())).map_err(Failure::os("mounting a tmpfs"))
}

const MKFS: [&str; 3] = ["/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4", "/usr/local/sbin/mkfs.ext4"];

fn has_mkfs() -> bool {
    MKFS.iter().any(|path| Path::new(path).exists())
}

fn make_file_system(image: &Path) -> io::Result<()> {
    let found = MKFS.iter().find(|path| Path::new(path).exists());
    let program = found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no mkfs.ext4"))?;
    let features = ["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode", "-E"];
    let extended = "lazy_itable_init=1,nodiscard,root_owner=0:0";
    let output = Command::new(program).args(features).arg(extended).arg(image).env_clear().output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

fn mount_loop(image: &Path, at: &Path) -> io::Result<()> {
    let backing = OpenOptions::new().read(true).write(true).open(image)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..64 {
        // SAFETY: the call takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        match configure(&device, backing.as_raw_fd()) {
            // Somebody else was given the same number.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
            Err(e) => return Err(e),
            Ok(()) => {}
        }
        // The device frees itself when the mount and this descriptor are gone.
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        return mount(Some(&path), at, Some("ext4"), flags, None::<&str>).map_err(io::Error::from);
    }
    Err(io::Error::other("no loop device could be had in 64 tries"))
}

fn configure(device: &File, backing: RawFd) -> io::Result<()> {
    let config = LoopConfig {
        fd: u32::try_from(backing).expect("an open descriptor is not negative"),
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one struct of this layout.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts the layers (lowest first) under the scratch layer that is mounted at `DIR/scratch`, as `root`. The options of a
/// mount fit one page, so that layers are named by short links in `DIR/lower`.
pub(super) fn mount_root(layers: &[PathBuf], dir: &Path, root: &Path) -> Result<(), Failure> {
    let names = dir.join("lower");
    let prepare = || -> io::Result<String> {
        fs::create_dir_all(&names)?;
        for (i, layer) in layers.iter().rev().enumerate() {
            symlink(layer, names.join(i.to_string()))?;
        }
        if layers.is_empty() {
            fs::create_dir(names.join("0"))?;
        }
        for made in ["upper", "work"] {
            fs::create_dir_all(dir.join("scratch").join(made))?;
        }
        fs::set_permissions(dir.join("scratch/upper"), fs::Permissions::from_mode(0o755))?;
        std::env::set_current_dir(&names)?;
        let lower: Vec<String> = (0..layers.len().max(1)).map(|i| i.to_string()).collect();
        Ok(format!("lowerdir={},upperdir=../scratch/upper,workdir=../scratch/work", lower.join(":")))
    };
    let options = prepare().map_err(Failure::io("stacking layers"))?;
    let mounted = mount(Some("overlay"), root, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()));
    mounted.map_err(Failure::os("mounting the overlay"))?;
    std::env::set_current_dir("/").map_err(Failure::io("going back to /"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn the_size_is_reserved_with_room_for_tables() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        reserve(&image, 1 << 20).unwrap();
        assert!(fs::metadata(&image).unwrap().len() >= 2 << 20);
    }
}
