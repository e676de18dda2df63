//! Images made by hand: an OCI layout of Debian's static busybox, and layers that mean harm.

use std::fs;
use std::io::Write;
use std::path::Path;

use nexus_compute::image::{BlobStore, import};
use nexus_model::Digest;
use serde_json::{Value, json};

pub const ARCH: &str = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };

pub fn layer() -> tar::Builder<Vec<u8>> {
    tar::Builder::new(Vec::new())
}

/// Appends an entry whose name is taken as it is, however bad.
pub fn add(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, link: &str, mode: u32, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header.set_size(content.len() as u64);
    if matches!(kind, tar::EntryType::Char) {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
    }
    header.set_cksum();
    tar.append(&header, content).unwrap();
}

pub fn file(tar: &mut tar::Builder<Vec<u8>>, name: &str, mode: u32, content: &[u8]) {
    add(tar, tar::EntryType::Regular, name, "", mode, content);
}

pub fn dir(tar: &mut tar::Builder<Vec<u8>>, name: &str, mode: u32) {
    add(tar, tar::EntryType::Directory, name, "", mode, b"");
}

pub fn link(tar: &mut tar::Builder<Vec<u8>>, name: &str, to: &str) {
    add(tar, tar::EntryType::Symlink, name, to, 0o777, b"");
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Busybox, two users, and a second layer that hides and replaces things of the first.
pub fn busybox_layers() -> Vec<(Vec<u8>, Vec<u8>)> {
    let busybox = fs::read("/bin/busybox").expect("Debian's busybox-static is installed");
    let mut first = layer();
    for name in ["./", "bin", "etc", "tmp", "proc", "opaque", "plain"] {
        dir(&mut first, name, if name == "tmp" { 0o1777 } else { 0o755 });
    }
    file(&mut first, "bin/busybox", 0o755, &busybox);
    for name in [
        "sh", "sleep", "cat", "ls", "id", "dd", "echo", "true", "false", "mount", "stat", "kill", "hostname", "env",
        "head", "tail", "unshare", "mknod", "touch", "rm", "wc",
    ] {
        link(&mut first, &format!("bin/{name}"), "busybox");
    }
    file(&mut first, "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/srv:/bin/sh\n");
    file(&mut first, "etc/group", 0o644, b"root:x:0:\nweb:x:44:\nlogs:x:50:web\n");
    file(&mut first, "bin/text", 0o644, b"not a program\n");
    file(&mut first, "bin/garbage", 0o755, b"\x7fGARBAGE");
    file(&mut first, "opaque/below", 0o644, b"below");
    file(&mut first, "plain/gone", 0o644, b"gone");
    file(&mut first, "plain/kept", 0o644, b"kept");
    let first = first.into_inner().unwrap();

    let mut second = layer();
    dir(&mut second, "opaque", 0o750);
    file(&mut second, "opaque/.wh..wh..opq", 0o644, b"");
    file(&mut second, "opaque/above", 0o644, b"above");
    file(&mut second, "plain/.wh.gone", 0o644, b"");
    add(&mut second, tar::EntryType::Link, "opaque/hard", "opaque/above", 0o644, b"");
    let second = second.into_inner().unwrap();
    vec![(first.clone(), gzip(&first)), (second.clone(), zstd::encode_all(&second[..], 3).unwrap())]
}

/// Writes an OCI layout of layers, each given plain and as stored, and returns the manifest's digest.
pub fn write_layout(at: &Path, layers: &[(Vec<u8>, Vec<u8>)], execution: Value) -> Digest {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let diff_ids: Vec<Digest> = layers.iter().map(|(plain, _)| Digest::of(plain)).collect();
    let config = json!({
        "os": "linux",
        "architecture": ARCH,
        "config": execution,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string();
    let described: Vec<Value> = layers
        .iter()
        .map(|(_, stored)| {
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": put(stored),
                "size": stored.len(),
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(config.as_bytes()),
            "size": config.len(),
        },
        "layers": described,
    })
    .to_string();
    let digest = put(manifest.as_bytes());
    let named = |os: &str, arch: &str, digest: Digest| {
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": manifest.len(),
            "platform": {"os": os, "architecture": arch},
        })
    };
    let other = Digest::of(b"another platform's, not here");
    let index = json!({
        "schemaVersion": 2,
        "manifests": [named("linux", "s390x", other), named("linux", ARCH, digest), named("unknown", "unknown", other)],
    });
    fs::write(at.join("index.json"), index.to_string()).unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    digest
}

/// Imports a path into a store, as the CLI and a server do together.
pub fn store(blobs: &BlobStore, path: &Path) -> Digest {
    let imported = import(path).unwrap();
    for blob in &imported.blobs {
        let mut writer = blobs.put_stream(blob.digest, blob.size).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut blob.source.open().unwrap(), &mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, blob.size);
        writer.write(&bytes).unwrap();
        writer.finish().unwrap();
    }
    imported.digest
}

pub fn layered(blobs: &BlobStore, layers: &[(Vec<u8>, Vec<u8>)], execution: Value) -> Digest {
    let dir = tempfile::tempdir().unwrap();
    write_layout(dir.path(), layers, execution);
    store(blobs, dir.path())
}
