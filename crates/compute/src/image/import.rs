//! Reads an image from a path that a user gives: an OCI layout folder, an OCI archive, a Docker archive, or a
//! WebAssembly component.
//!
//! What comes out names blobs and where their bytes are, so that they can be uploaded one by one. Every digest that the
//! image states is computed anew on the way. A Docker archive (`docker save`) has no manifest in OCI's sense: one is made
//! for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_model::Digest;
use nexus_model::kind::ImageFormat;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::store::unblock;
use super::tarball::{Kind, TarReader};
use super::unpack::decompress;
use super::{
    Descriptor, ImageError, MAX_CONFIG, MAX_LAYERS, MAX_MANIFEST, Manifest, host_architecture, parse_config,
    parse_manifest,
};

/// An image that was found whole and sound.
#[derive(Debug)]
pub struct Imported {
    pub format: ImageFormat,
    /// The manifest's digest, or the component's.
    pub digest: Digest,
    /// Everything that the image needs, each blob once, the one that `digest` names last.
    pub blobs: Vec<ImportedBlob>,
}

#[derive(Debug, Clone)]
pub struct ImportedBlob {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub source: Source,
}

/// Where a blob's bytes are.
#[derive(Debug, Clone)]
pub enum Source {
    Bytes(Arc<[u8]>),
    /// A piece of a file.
    Part {
        file: Arc<Backing>,
        offset: u64,
        size: u64,
    },
}

/// A file that blobs are read from; one that was made for the import goes with its last user.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
    _temporary: Option<tempfile::TempPath>,
}

impl Source {
    pub fn open(&self) -> io::Result<Box<dyn Read + Send>> {
        match self {
            Self::Bytes(bytes) => Ok(Box::new(io::Cursor::new(Arc::clone(bytes)))),
            Self::Part { file, offset, size } => {
                let mut opened = File::open(&file.path)?;
                opened.seek(SeekFrom::Start(*offset))?;
                Ok(Box::new(opened.take(*size)))
            }
        }
    }

    fn read(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let read = self.open().and_then(|r| r.take(limit + 1).read_to_end(&mut bytes));
        read.map_err(ImageError::io(format!("reading blob {digest}")))?;
        if bytes.len() as u64 > limit {
            return Err(ImageError::TooLong { blob: digest, limit });
        }
        Ok(bytes)
    }
}

/// The longest archive that is unpacked to a temporary file, in bytes.
const MAX_ARCHIVE: u64 = 64 << 30;
/// Bounds one component, in bytes.
const MAX_COMPONENT: u64 = 256 << 20;
/// An index may name indexes, so deep.
const MAX_NESTING: u32 = 4;

/// Reads an image. Blocks; [`import_async`] doesn't.
pub fn import(path: &Path) -> Result<Imported, ImageError> {
    let shown = path.display().to_string();
    let meta = fs::metadata(path).map_err(ImageError::io(format!("reading {shown}")))?;
    if meta.is_dir() {
        return import_layout(&Folder { path }, &shown);
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|f| f.take(512).read_to_end(&mut head));
    read.map_err(ImageError::io(format!("reading {shown}")))?;
    if head.starts_with(b"\0asm") {
        return import_component(path, meta.len(), &head, &shown);
    }
    let packed = head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let is_tar = head.get(257..262) == Some(b"ustar");
    if !packed && !is_tar {
        let wasm = path.extension().is_some_and(|e| e == "wasm");
        let message = if wasm {
            "is not WebAssembly: it does not begin with the magic number \\0asm"
        } else {
            "is neither an OCI layout, an OCI or Docker archive (.tar, .tar.gz), nor a WebAssembly component"
        };
        return Err(ImageError::invalid(shown, message));
    }
    let archive = Archive::read(path, packed, &shown)?;
    if archive.files.contains_key("index.json") {
        import_layout(&archive, &shown)
    } else if archive.files.contains_key("manifest.json") {
        import_docker(&archive, &shown)
    } else {
        Err(ImageError::invalid(shown, "has neither index.json (OCI) nor manifest.json (Docker): not an image archive"))
    }
}

pub async fn import_async(path: PathBuf) -> Result<Imported, ImageError> {
    unblock(move || import(&path)).await
}

fn import_component(path: &Path, size: u64, head: &[u8], shown: &str) -> Result<Imported, ImageError> {
    // The preamble: magic, version, layer. A core module has version 1 of layer 0, a component layer 1.
    match head.get(4..8) {
        Some([_, _, 1, 0]) => {}
        Some([1, 0, 0, 0]) => {
            let message = "is a core module, not a component: build with --target wasm32-wasip2";
            return Err(ImageError::invalid(shown, message));
        }
        _ => return Err(ImageError::invalid(shown, "is not a WebAssembly component: its preamble is unknown")),
    }
    if size > MAX_COMPONENT {
        return Err(ImageError::invalid(shown, format!("is longer than {MAX_COMPONENT} bytes")));
    }
    let bytes = fs::read(path).map_err(ImageError::io(format!("reading {shown}")))?;
    check_sections(&bytes).map_err(|message| ImageError::invalid(shown, message))?;
    let digest = Digest::of(&bytes);
    let blob = ImportedBlob { digest, size: bytes.len() as u64, source: Source::Bytes(bytes.into()) };
    Ok(Imported { format: ImageFormat::Wasm, digest, blobs: vec![blob] })
}

/// Walks the sections (id, length as LEB128, content), so that a cut or damaged file is noticed here; whether it is valid
/// is found when a host compiles it.
fn check_sections(bytes: &[u8]) -> Result<(), &'static str> {
    const DAMAGED: &str = "is damaged or cut off: its sections don't add up";
    let mut rest = &bytes[8..];
    while let Some((_, after)) = rest.split_first() {
        let mut length = 0u64;
        let mut used = 0;
        loop {
            let byte = *after.get(used).filter(|_| used < 5).ok_or(DAMAGED)?;
            length |= u64::from(byte & 0x7f) << (7 * used);
            used += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let length = usize::try_from(length).map_err(|_| DAMAGED)?;
        rest = after[used..].get(length..).ok_or(DAMAGED)?;
    }
    Ok(())
}

/// A set of named files: a folder or an archive.
trait Files {
    fn find(&self, name: &str) -> Result<Option<Found>, ImageError>;
}

/// A file, and the digest of its content, computed.
struct Found {
    digest: Digest,
    size: u64,
    source: Source,
}

struct Folder<'a> {
    path: &'a Path,
}

impl Files for Folder<'_> {
    fn find(&self, name: &str) -> Result<Option<Found>, ImageError> {
        let path = self.path.join(name);
        let attempt = || format!("reading {}", path.display());
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(ImageError::io(attempt())(e)),
        };
        let (digest, size) = hash(&mut file).map_err(ImageError::io(attempt()))?;
        let file = Arc::new(Backing { path, _temporary: None });
        Ok(Some(Found { digest, size, source: Source::Part { file, offset: 0, size } }))
    }
}

fn hash(reader: &mut impl Read) -> io::Result<(Digest, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok((Digest::from_sha256(hash.finalize().into()), size)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// An archive's files, by name, hashed in one pass.
struct Archive {
    backing: Arc<Backing>,
    files: BTreeMap<String, Member>,
}

enum Member {
    File {
        digest: Digest,
        offset: u64,
        size: u64,
    },
    /// `docker save` writes a layer that appears twice as a link to the first.
    Link(String),
}

impl Archive {
    fn read(path: &Path, packed: bool, shown: &str) -> Result<Self, ImageError> {
        let attempt = || format!("reading {shown}");
        let backing =
            if packed { unpack_archive(path, shown)? } else { Backing { path: path.into(), _temporary: None } };
        let file = File::open(&backing.path).map_err(ImageError::io(attempt()))?;
        let mut reader = TarReader::new(io::BufReader::with_capacity(1 << 16, file));
        let mut files = BTreeMap::new();
        let bad = |e: super::tarball::TarError| match e {
            super::tarball::TarError::Io(source) => ImageError::Io { attempt: attempt(), source },
            other => ImageError::invalid(shown, other.to_string()),
        };
        while let Some(entry) = reader.next().map_err(bad)? {
            let name = String::from_utf8_lossy(&entry.path).trim_start_matches("./").trim_end_matches('/').to_owned();
            if files.len() > 8 * MAX_LAYERS {
                return Err(ImageError::invalid(shown, "has more files than any image: not an image archive"));
            }
            match entry.kind {
                Kind::File => {
                    let (digest, size) = hash(&mut reader).map_err(ImageError::io(attempt()))?;
                    files.insert(name, Member::File { digest, offset: entry.offset, size });
                }
                Kind::Symlink | Kind::HardLink => {
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    let target = if entry.kind == Kind::Symlink { beside(&name, &target) } else { target };
                    files.insert(name, Member::Link(target));
                }
                Kind::Dir => {}
                Kind::Fifo | Kind::Device => return Err(ImageError::invalid(shown, "is not an image archive")),
            }
        }
        Ok(Self { backing: Arc::new(backing), files })
    }
}

/// Where a relative link at `name` leads, within the archive.
fn beside(name: &str, target: &str) -> String {
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Decompresses an archive to a temporary file, so that its pieces can be read in any order.
fn unpack_archive(path: &Path, shown: &str) -> Result<Backing, ImageError> {
    let attempt = || format!("unpacking {shown}");
    let file = File::open(path).map_err(ImageError::io(attempt()))?;
    let mut reader = decompress(file).map_err(ImageError::io(attempt()))?.take(MAX_ARCHIVE + 1);
    let (mut out, temporary) = tempfile::NamedTempFile::new().map_err(ImageError::io(attempt()))?.into_parts();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) => return Err(ImageError::invalid(shown, format!("can't be decompressed: {e}"))),
        };
        total += n as u64;
        if total > MAX_ARCHIVE {
            return Err(ImageError::invalid(shown, format!("unpacks to more than {MAX_ARCHIVE} bytes")));
        }
        out.write_all(&buffer[..n]).map_err(ImageError::io(attempt()))?;
    }
    out.flush().map_err(ImageError::io(attempt()))?;
    Ok(Backing { path: temporary.to_path_buf(), _temporary: Some(temporary) })
}

impl Files for Archive {
    fn find(&self, name: &str) -> Result<Option<Found>, ImageError> {
        let mut name = name;
        for _ in 0..4 {
            match self.files.get(name) {
                Some(Member::File { digest, offset, size }) => {
                    let source = Source::Part { file: Arc::clone(&self.backing), offset: *offset, size: *size };
                    return Ok(Some(Found { digest: *digest, size: *size, source }));
                }
                Some(Member::Link(target)) => name = target,
                None => return Ok(None),
            }
        }
        Ok(None)
    }
}

/// Collects an image's blobs, each once.
#[derive(Default)]
struct Collected(Vec<ImportedBlob>);

impl Collected {
    fn add(&mut self, digest: Digest, found: Found) {
        if !self.0.iter().any(|b| b.digest == digest) {
            self.0.push(ImportedBlob { digest, size: found.size, source: found.source });
        }
    }
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

fn import_layout(files: &dyn Files, shown: &str) -> Result<Imported, ImageError> {
    let index = files.find("index.json")?;
    let index = index.ok_or_else(|| ImageError::invalid(shown, "has no index.json: not an OCI layout"))?;
    let index = index.source.read(index.digest, MAX_MANIFEST)?;
    let mut descriptor = choose(&index, &format!("{shown}: index.json"))?;
    for _ in 0..MAX_NESTING {
        let found = blob(files, &descriptor)?;
        let bytes = found.source.read(descriptor.digest, MAX_MANIFEST)?;
        let kind = &descriptor.media_type;
        if kind.contains("image.index") || kind.contains("manifest.list") {
            descriptor = choose(&bytes, &format!("index {}", descriptor.digest))?;
            continue;
        }
        let manifest = parse_manifest(descriptor.digest, &bytes)?;
        let mut blobs = Collected::default();
        let config = blob(files, &manifest.config)?;
        parse_config(&manifest, &config.source.read(manifest.config.digest, MAX_CONFIG)?)?;
        for layer in &manifest.layers {
            blobs.add(layer.digest, blob(files, layer)?);
        }
        blobs.add(manifest.config.digest, config);
        blobs.add(descriptor.digest, found);
        return Ok(Imported { format: ImageFormat::Oci, digest: descriptor.digest, blobs: blobs.0 });
    }
    Err(ImageError::invalid(shown, "has indexes within indexes, too deep"))
}

/// The manifest for this machine, of those that an index names.
pub(super) fn choose(index: &[u8], what: &str) -> Result<Descriptor, ImageError> {
    let index: Index =
        serde_json::from_slice(index).map_err(|e| ImageError::invalid(what, format!("is not an image index: {e}")))?;
    let fits =
        |d: &&Descriptor| d.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == host_architecture());
    match index.manifests.as_slice() {
        [] => Err(ImageError::invalid(what, "names no image")),
        [only] if only.platform.is_none() => Ok(only.clone()),
        many => match many.iter().find(fits) {
            Some(fitting) => Ok(fitting.clone()),
            None if many.iter().all(|d| d.platform.is_none()) => {
                let message = format!("names {} images; export the one that you want alone", many.len());
                Err(ImageError::invalid(what, message))
            }
            None => {
                let platforms = many.iter().filter_map(|d| d.platform.as_ref());
                let found: Vec<String> = platforms.map(|p| format!("{}/{}", p.os, p.architecture)).collect();
                let message = format!("has no image for linux/{}, only {}", host_architecture(), found.join(", "));
                Err(ImageError::invalid(what, message))
            }
        },
    }
}

fn blob(files: &dyn Files, descriptor: &Descriptor) -> Result<Found, ImageError> {
    let found = files.find(&format!("blobs/sha256/{}", descriptor.digest.hex()))?;
    let found = found.ok_or(ImageError::Missing(descriptor.digest))?;
    if found.digest != descriptor.digest {
        return Err(ImageError::WrongDigest { expected: descriptor.digest, found: found.digest });
    }
    if found.size != descriptor.size {
        return Err(ImageError::WrongSize { blob: descriptor.digest, expected: descriptor.size, found: found.size });
    }
    Ok(found)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    layers: Vec<String>,
}

fn import_docker(files: &dyn Files, shown: &str) -> Result<Imported, ImageError> {
    let missing = |name: &str| ImageError::invalid(shown, format!("has no file {name:?} that its manifest names"));
    let list = files.find("manifest.json")?.ok_or_else(|| missing("manifest.json"))?;
    let list: Vec<DockerImage> = serde_json::from_slice(&list.source.read(list.digest, MAX_MANIFEST)?)
        .map_err(|e| ImageError::invalid(format!("{shown}: manifest.json"), format!("can't be read: {e}")))?;
    let [image] = list.as_slice() else {
        return Err(ImageError::invalid(shown, format!("has {} images; save the one that you want alone", list.len())));
    };
    let config = files.find(&image.config)?.ok_or_else(|| missing(&image.config))?;
    // The file is named for the digest that it must have: `<hex>.json`, or `blobs/sha256/<hex>`.
    let stem = Path::new(&image.config).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if let Ok(expected) = format!("sha256:{}", stem.trim_end_matches(".json")).parse::<Digest>()
        && expected != config.digest
    {
        return Err(ImageError::WrongDigest { expected, found: config.digest });
    }
    let mut blobs = Collected::default();
    let mut layers = Vec::new();
    let mut plain = Vec::new();
    for name in &image.layers {
        let found = files.find(name)?.ok_or_else(|| missing(name))?;
        let mut magic = Vec::new();
        let read = found.source.open().and_then(|r| r.take(4).read_to_end(&mut magic));
        read.map_err(ImageError::io(format!("reading {name} of {shown}")))?;
        let suffix = match magic.as_slice() {
            [0x1f, 0x8b, ..] => "+gzip",
            [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
            _ => "",
        };
        plain.push(suffix.is_empty());
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
        layers.push(Descriptor { media_type, digest: found.digest, size: found.size, platform: None });
        blobs.add(found.digest, found);
    }
    let describe = |d: &Descriptor| serde_json::json!({"mediaType": d.media_type, "digest": d.digest, "size": d.size});
    let media_type = "application/vnd.oci.image.config.v1+json".to_owned();
    let manifest = Manifest {
        config: Descriptor { media_type, digest: config.digest, size: config.size, platform: None },
        layers,
    };
    let parsed = parse_config(&manifest, &config.source.read(config.digest, MAX_CONFIG)?)?;
    for ((layer, diff_id), plain) in manifest.layers.iter().zip(&parsed.rootfs.diff_ids).zip(plain) {
        if plain && layer.digest != *diff_id {
            return Err(ImageError::WrongDigest { expected: *diff_id, found: layer.digest });
        }
    }
    let text = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe(&manifest.config),
        "layers": manifest.layers.iter().map(describe).collect::<Vec<_>>(),
    })
    .to_string()
    .into_bytes();
    let digest = Digest::of(&text);
    parse_manifest(digest, &text)?;
    blobs.add(config.digest, config);
    let size = text.len() as u64;
    blobs.add(digest, Found { digest, size, source: Source::Bytes(text.into()) });
    Ok(Imported { format: ImageFormat::Oci, digest, blobs: blobs.0 })
}
