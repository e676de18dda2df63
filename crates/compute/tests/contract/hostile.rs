//! Images that are wrong or mean harm, and the ways in which good ones come.

use std::fs;
use std::io::Write;
use std::path::Path;

use nexus_compute::image::{BlobStore, Image, ImageError, UnpackLimits, import, unpack};
use nexus_model::Digest;
use nexus_model::kind::ImageFormat;
use serde_json::json;
use tar::EntryType;

use crate::images::{add, busybox_layers, dir, file, gzip, layer, layered, link, store, write_layout};

struct Place {
    dir: tempfile::TempDir,
    blobs: BlobStore,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::open(dir.path().join("store")).unwrap();
        Self { dir, blobs }
    }

    fn unpack(&self, plain: Vec<u8>, limits: UnpackLimits) -> Result<std::path::PathBuf, ImageError> {
        let stored = gzip(&plain);
        self.unpack_as(plain, stored, limits)
    }

    fn unpack_as(
        &self,
        plain: Vec<u8>,
        stored: Vec<u8>,
        limits: UnpackLimits,
    ) -> Result<std::path::PathBuf, ImageError> {
        let digest = layered(&self.blobs, &[(plain, stored)], json!({"Cmd": ["x"]}));
        let image = Image::load(&self.blobs, digest).unwrap();
        unpack(&self.blobs, &image, &self.layers(), limits).map(|mut folders| folders.remove(0))
    }

    fn layers(&self) -> std::path::PathBuf {
        self.dir.path().join("layers")
    }

    /// The layer must be refused with these words, and nothing of it may stay.
    fn refuse(&self, plain: Vec<u8>, words: &str) {
        let error = self.unpack(plain, UnpackLimits::default()).unwrap_err();
        assert!(!matches!(error, ImageError::Io { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(fs::read_dir(self.layers()).unwrap().count(), 0);
    }
}

async fn entries_that_lead_out_are_refused() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    fs::write(&outside, "untouched").unwrap();

    for name in ["../../outside", "a/../../../outside", ".."] {
        let mut tar = layer();
        file(&mut tar, name, 0o644, b"touched");
        place.refuse(tar.into_inner().unwrap(), "leads out of the layer by \"..\"");
    }
    let mut tar = layer();
    file(&mut tar, outside.to_str().unwrap(), 0o644, b"touched");
    place.refuse(tar.into_inner().unwrap(), "is an absolute path");

    for target in ["/", place.dir.path().to_str().unwrap(), "../../..", "/proc/self/cwd"] {
        let mut tar = layer();
        link(&mut tar, "way", target);
        file(&mut tar, "way/outside", 0o644, b"touched");
        place.refuse(tar.into_inner().unwrap(), "leads out of the layer through a symbolic link");
    }
    // A file is written in a link's place, not through it.
    let mut tar = layer();
    link(&mut tar, "file", outside.to_str().unwrap());
    file(&mut tar, "file", 0o644, b"inside");
    let folder = place.unpack(tar.into_inner().unwrap(), UnpackLimits::default()).unwrap();
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"inside");
    // A hard link to what is outside, by name or through a link.
    for target in ["../../outside", "way/outside"] {
        let place = Place::new();
        let mut tar = layer();
        link(&mut tar, "way", "../../..");
        add(&mut tar, EntryType::Link, "stolen", target, 0o644, b"");
        place.refuse(tar.into_inner().unwrap(), "leads out of the layer");
    }
    // Whiteouts, too, stay inside.
    let place = Place::new();
    let mut tar = layer();
    link(&mut tar, "way", "../../..");
    file(&mut tar, "way/.wh.outside", 0o644, b"");
    place.refuse(tar.into_inner().unwrap(), "leads out of the layer through a symbolic link");
    let mut tar = layer();
    file(&mut tar, ".wh...", 0o644, b"");
    place.refuse(tar.into_inner().unwrap(), "hides no name");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
}

async fn device_nodes_are_refused() {
    let place = Place::new();
    let mut tar = layer();
    add(&mut tar, EntryType::Char, "dev/null", "", 0o666, b"");
    place.refuse(tar.into_inner().unwrap(), "\"dev/null\": is a device node");
}

async fn bombs_are_refused() {
    let place = Place::new();
    let small = UnpackLimits { free_bytes: 1 << 20, max_ratio: 10, ..UnpackLimits::default() };
    let mut tar = layer();
    file(&mut tar, "zeros", 0o644, &vec![0; 8 << 20]);
    let bomb = tar.into_inner().unwrap();
    let error = place.unpack(bomb.clone(), small).unwrap_err().to_string();
    assert!(error.contains("decompression bomb"), "{error}");
    // Behind the archive's end, where nobody looks.
    let mut tar = layer();
    file(&mut tar, "small", 0o644, b"x");
    let mut tail = tar.into_inner().unwrap();
    tail.extend(vec![0; 8 << 20]);
    assert!(place.unpack(tail, small).unwrap_err().to_string().contains("decompression bomb"));
    let many = UnpackLimits { max_entries: 10, ..UnpackLimits::default() };
    let mut tar = layer();
    (0..11).for_each(|i| dir(&mut tar, &format!("d{i}"), 0o755));
    let error = place.unpack(tar.into_inner().unwrap(), many).unwrap_err().to_string();
    assert!(error.contains("more than 10 entries"), "{error}");
    assert_eq!(fs::read_dir(place.layers()).unwrap().count(), 0);
    // What is only large passes.
    place.unpack(bomb, UnpackLimits::default()).unwrap();
}

async fn a_layer_that_is_not_what_the_image_says_is_refused() {
    let place = Place::new();
    let mut tar = layer();
    file(&mut tar, "a", 0o644, b"a");
    let told = tar.into_inner().unwrap();
    let mut tar = layer();
    file(&mut tar, "a", 0o644, b"b");
    let given = gzip(&tar.into_inner().unwrap());
    let error = place.unpack_as(told.clone(), given, UnpackLimits::default()).unwrap_err().to_string();
    assert!(error.contains("where the image's configuration says"), "{error}");
    let mut cut = gzip(&told);
    cut.truncate(cut.len() - 10);
    let error = place.unpack_as(told, cut, UnpackLimits::default()).unwrap_err();
    assert!(matches!(error, ImageError::Layer { .. }), "{error}");
    let error = place
        .unpack(b"no archive at all, but long enough for a header".repeat(20), UnpackLimits::default())
        .unwrap_err();
    assert!(error.to_string().contains("not a tar archive"), "{error}");
    assert_eq!(fs::read_dir(place.layers()).unwrap().count(), 0);
}

async fn owners_modes_times_and_attributes_are_kept() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let mut tar = layer();
    dir(&mut tar, "d", 0o2750);
    let mut header = tar::Header::new_gnu();
    header.set_uid(1234);
    header.set_gid(5678);
    header.set_mode(0o4711);
    header.set_mtime(1_234_567_890);
    header.set_size(1);
    let attributes = [("SCHILY.xattr.user.note", &b"kept"[..]), ("SCHILY.xattr.trusted.overlay.redirect", b"/etc")];
    tar.append_pax_extensions(attributes).unwrap();
    tar.append_data(&mut header, "d/f", &b"x"[..]).unwrap();
    add(&mut tar, EntryType::Link, "d/hard", "d/f", 0o644, b"");
    let folder = place.unpack(tar.into_inner().unwrap(), UnpackLimits::default()).unwrap();
    let meta = fs::metadata(folder.join("d/f")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.mtime(), meta.nlink()),
        (1234, 5678, 0o4711, 1_234_567_890, 2)
    );
    let parent = fs::metadata(folder.join("d")).unwrap();
    assert_eq!((parent.mode() & 0o7777, parent.mtime()), (0o2750, 1_000_000_000));
    let mut value = [0; 16];
    assert_eq!(rustix::fs::getxattr(folder.join("d/f"), "user.note", &mut value[..]), Ok(4));
    assert!(rustix::fs::getxattr(folder.join("d/f"), "trusted.overlay.redirect", &mut value[..]).is_err());
}

/// Writes a folder's files as an archive.
fn archive(from: &Path, to: &Path, pack: fn(&[u8]) -> Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", from).unwrap();
    fs::write(to, pack(&tar.into_inner().unwrap())).unwrap();
}

async fn images_come_as_layouts_and_archives() {
    let place = Place::new();
    let layout = place.dir.path().join("layout");
    let digest = write_layout(&layout, &busybox_layers(), json!({}));
    let imported = import(&layout).unwrap();
    assert_eq!((imported.format, imported.digest, imported.blobs.len()), (ImageFormat::Oci, digest, 4));
    assert_eq!(imported.blobs.last().unwrap().digest, digest);
    for (name, pack) in [("a.tar", (|b| b.to_vec()) as fn(&[u8]) -> Vec<u8>), ("a.tar.gz", gzip)] {
        let path = place.dir.path().join(name);
        archive(&layout, &path, pack);
        let blobs = BlobStore::open(place.dir.path().join(format!("store-{name}"))).unwrap();
        assert_eq!(store(&blobs, &path), digest);
        Image::load(&blobs, digest).unwrap();
    }
}

async fn docker_archives_are_converted() {
    let place = Place::new();
    let saved = place.dir.path().join("saved");
    fs::create_dir_all(saved.join("one")).unwrap();
    fs::create_dir_all(saved.join("two")).unwrap();
    let layers = busybox_layers();
    fs::write(saved.join("one/layer.tar"), &layers[0].0).unwrap();
    fs::write(saved.join("two/layer.tar"), &layers[1].0).unwrap();
    let config = |diff_ids: &[Digest]| {
        json!({"os": "linux", "architecture": crate::images::ARCH, "config": {"Cmd": ["sh"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}})
            .to_string()
    };
    let diff_ids: Vec<Digest> = layers.iter().map(|(plain, _)| Digest::of(plain)).collect();
    let good = config(&diff_ids);
    let name = format!("{}.json", Digest::of(good.as_bytes()).hex());
    let manifest = json!([{"Config": name, "RepoTags": ["x:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}]);
    fs::write(saved.join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(saved.join(&name), &good).unwrap();
    let path = place.dir.path().join("saved.tar");
    archive(&saved, &path, |b| b.to_vec());
    let digest = store(&place.blobs, &path);
    let image = Image::load(&place.blobs, digest).unwrap();
    assert_eq!(image.manifest.layers.iter().map(|l| l.digest).collect::<Vec<_>>(), diff_ids);
    unpack(&place.blobs, &image, &place.layers(), UnpackLimits::default()).unwrap();

    fs::write(saved.join(&name), config(&[diff_ids[1], diff_ids[0]])).unwrap();
    archive(&saved, &path, |b| b.to_vec());
    assert!(matches!(import(&path), Err(ImageError::WrongDigest { .. })));
}

async fn wrong_digests_are_named() {
    let place = Place::new();
    let layout = place.dir.path().join("layout");
    write_layout(&layout, &busybox_layers(), json!({}));
    let imported = import(&layout).unwrap();
    for blob in &imported.blobs {
        let path = layout.join("blobs/sha256").join(blob.digest.hex());
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&path, bad).unwrap();
        let error = import(&layout).unwrap_err();
        assert!(matches!(error, ImageError::WrongDigest { expected, .. } if expected == blob.digest), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(import(&layout).unwrap_err(), ImageError::Missing(d) if d == blob.digest));
        fs::write(&path, good).unwrap();
    }
    import(&layout).unwrap();
}

async fn what_is_no_image_is_refused() {
    let place = Place::new();
    let path = place.dir.path().join("x.wasm");
    let refuse = |bytes: &[u8], words: &str| {
        fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        let error = import(&path).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refuse(b"\0asm\x01\0\0\0", "is a core module, not a component: build with --target wasm32-wasip2");
    refuse(b"\0asm\x0d\0\x01\0\x01\x7fcut", "is damaged or cut off");
    refuse(b"\0asm", "preamble is unknown");
    refuse(b"hello", "is not WebAssembly");
    refuse(b"", "is not WebAssembly");
    refuse(&gzip(b"hello"), "not a tar archive");
    let mut tar = layer();
    file(&mut tar, "readme", 0o644, b"x");
    refuse(&tar.into_inner().unwrap(), "not an image archive");
    let empty = tempfile::tempdir().unwrap();
    assert!(import(empty.path()).unwrap_err().to_string().contains("not an OCI layout"));
    assert!(matches!(import(Path::new("/no/such/image")), Err(ImageError::Io { .. })));

    fs::write(&path, b"\0asm\x0d\0\x01\0\x00\x02ab").unwrap();
    let imported = import(&path).unwrap();
    assert_eq!((imported.format, imported.digest), (ImageFormat::Wasm, imported.blobs[0].digest));
}

crate::tests![
    entries_that_lead_out_are_refused,
    device_nodes_are_refused,
    bombs_are_refused,
    a_layer_that_is_not_what_the_image_says_is_refused,
    owners_modes_times_and_attributes_are_kept,
    images_come_as_layouts_and_archives,
    docker_archives_are_converted,
    wrong_digests_are_named,
    what_is_no_image_is_refused,
];
