//! Reads tar streams that nobody vouches for: every length is bounded before memory is taken for it.
//!
//! Understands what image builders write: ustar, GNU long names, PAX records (path, linkpath, size, uid, gid, mtime and
//! `SCHILY.xattr.*`). Sparse files are refused.

use std::io::{self, Read};

/// Bounds one PAX header or long name, in bytes.
const MAX_EXTENSION: u64 = 1 << 20;
/// Linux's own bound on a path.
const MAX_PATH: usize = 4096;
const BLOCK: usize = 512;

#[derive(Debug, thiserror::Error)]
pub(super) enum TarError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("not a tar archive, or a damaged one: {0}")]
    Damaged(&'static str),
    #[error("entry {0:?} {1}")]
    Unsupported(String, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    Dir,
    Fifo,
    Device,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    pub size: u64,
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Where the content begins in the stream.
    pub offset: u64,
}

/// What PAX and GNU headers say of the entry that follows.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(String, Vec<u8>)>,
    sparse: bool,
}

pub(super) struct TarReader<R> {
    inner: R,
    position: u64,
    /// Of the current entry: content that was not read yet, and the padding behind it.
    content: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, position: 0, content: 0, padding: 0 }
    }

    /// The next entry, whose content is then read from `self`. What was not read of the former one is skipped.
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extension = Extension::default();
        loop {
            let Some(block) = self.header_block()? else { return Ok(None) };
            let header = tar::Header::from_byte_slice(&block);
            if header.cksum().ok() != Some(checksum(&block)) {
                return Err(TarError::Damaged("a header's checksum is wrong"));
            }
            let size = number(&block[124..136], header.entry_size())?;
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
                let bytes = self.extension(size)?;
                match kind.as_byte() {
                    b'L' => extension.path = Some(until_zero(bytes)),
                    b'K' => extension.link = Some(until_zero(bytes)),
                    _ => pax(&bytes, &mut extension)?,
                }
                continue;
            }
            if kind.is_pax_global_extensions() {
                // Comments, such as the commit that `git archive` was given.
                self.extension(size)?;
                continue;
            }
            let path = extension.path.take().unwrap_or_else(|| header.path_bytes().into_owned());
            let link = extension.link.take().or_else(|| header.link_name_bytes().map(|l| l.into_owned()));
            let link = link.unwrap_or_default();
            let shown = || String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
            if path.len() >= MAX_PATH || link.len() >= MAX_PATH {
                return Err(TarError::Unsupported(shown(), "has a path longer than 4095 bytes"));
            }
            let kind = match kind.as_byte() {
                // Before POSIX, a folder was told by its name alone.
                b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Dir,
                b'0' | 0 | b'7' => Kind::File,
                b'1' => Kind::HardLink,
                b'2' => Kind::Symlink,
                b'3' | b'4' => Kind::Device,
                b'5' => Kind::Dir,
                b'6' => Kind::Fifo,
                b'S' => return Err(TarError::Unsupported(shown(), "is a sparse file, which is not supported")),
                _ => return Err(TarError::Unsupported(shown(), "has a type that is not supported")),
            };
            if extension.sparse {
                return Err(TarError::Unsupported(shown(), "is a sparse file, which is not supported"));
            }
            let size = extension.size.unwrap_or(size);
            // Only files have content; some writers put a size at links all the same.
            let content = if kind == Kind::File { size } else { 0 };
            self.begin_content(content);
            let id = |given: Option<u32>, header: Result<u64, TarError>| match given {
                Some(id) => Ok(id),
                None => u32::try_from(header?).map_err(|_| TarError::Damaged("an owner's id is out of range")),
            };
            return Ok(Some(Entry {
                link,
                kind,
                mode: number(&block[100..108], header.mode())? & 0o7777,
                uid: id(extension.uid, number(&block[108..116], header.uid()))?,
                gid: id(extension.gid, number(&block[116..124], header.gid()))?,
                mtime: match extension.mtime {
                    Some(mtime) => mtime,
                    None => (i64::try_from(number(&block[136..148], header.mtime())?).unwrap_or(0), 0),
                },
                size: content,
                xattrs: extension.xattrs,
                offset: self.position,
                path,
            }));
        }
    }

    pub fn into_inner(self) -> R {
        self.inner
    }

    /// Reads to the end of the stream, past the archive's end, so that whoever hashes it sees all of it.
    pub fn drain(&mut self) -> io::Result<()> {
        let copied = io::copy(&mut self.inner, &mut io::sink())?;
        self.position += copied;
        Ok(())
    }

    fn begin_content(&mut self, size: u64) {
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// The next block that is not zero, or nothing at the end.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let skip = self.content + self.padding;
        let skipped = io::copy(&mut (&mut self.inner).take(skip), &mut io::sink())?;
        self.position += skipped;
        if skipped < self.content {
            return Err(TarError::Damaged("it ends in the middle of an entry"));
        }
        if skipped < skip {
            // Some writers leave out what pads the last entry, and the end. The layer's digest says that nothing is lost.
            return Ok(None);
        }
        (self.content, self.padding) = (0, 0);
        let mut zeros = 0;
        loop {
            let mut block = [0; BLOCK];
            let mut filled = 0;
            while filled < BLOCK {
                match self.inner.read(&mut block[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.into()),
                }
            }
            self.position += filled as u64;
            match filled {
                0 => return Ok(None),
                BLOCK if block != [0; BLOCK] => return Ok(Some(block)),
                BLOCK => zeros += 1,
                _ => return Err(TarError::Damaged("it ends in the middle of a header")),
            }
            // Two empty blocks end an archive.
            if zeros == 2 {
                return Ok(None);
            }
        }
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            return Err(TarError::Damaged("an extended header is longer than 1 MiB"));
        }
        self.begin_content(size);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(TarError::Damaged("it ends in the middle of an extended header"));
        }
        Ok(bytes)
    }
}

/// The content of the current entry.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of an entry"));
        }
        self.content -= n as u64;
        self.position += n as u64;
        Ok(n)
    }
}

/// A number of a header; one that was left blank is zero, as GNU tar reads it.
fn number<T: Default>(field: &[u8], parsed: io::Result<T>) -> Result<T, TarError> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) {
        return Ok(T::default());
    }
    parsed.map_err(|_| TarError::Damaged("a header's number can't be read"))
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len()));
    bytes
}

/// The sum of a header's bytes, its checksum field read as blanks.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum()
}

/// Records of the form `LENGTH KEY=VALUE\n`, where the length counts the whole record.
fn pax(mut bytes: &[u8], into: &mut Extension) -> Result<(), TarError> {
    let damaged = || TarError::Damaged("a PAX record can't be read");
    while !bytes.is_empty() {
        let blank = bytes.iter().take(20).position(|b| *b == b' ').ok_or_else(damaged)?;
        let length: usize =
            std::str::from_utf8(&bytes[..blank]).ok().and_then(|l| l.parse().ok()).ok_or_else(damaged)?;
        if length <= blank + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
            return Err(damaged());
        }
        let record = &bytes[blank + 1..length - 1];
        bytes = &bytes[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(damaged)?;
        let key = std::str::from_utf8(&record[..equals]).map_err(|_| damaged())?;
        let value = &record[equals + 1..];
        let text = || std::str::from_utf8(value).map_err(|_| damaged());
        match key {
            "path" => into.path = Some(value.to_vec()),
            "linkpath" => into.link = Some(value.to_vec()),
            "size" => into.size = Some(text()?.parse().map_err(|_| damaged())?),
            "uid" => into.uid = Some(text()?.parse().map_err(|_| damaged())?),
            "gid" => into.gid = Some(text()?.parse().map_err(|_| damaged())?),
            "mtime" => into.mtime = Some(pax_time(text()?).ok_or_else(damaged)?),
            _ if key.starts_with("GNU.sparse") => into.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    into.xattrs.push((name.to_owned(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

/// Decimal seconds with any number of digits behind the point. Before 1970 fractions are dropped.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = part.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    Some((seconds, if seconds < 0 || whole.starts_with('-') { 0 } else { nanos }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_and_pax_records_are_read() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("{}/file", "a/".repeat(150));
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o4755);
        header.set_cksum();
        builder.append_data(&mut header, &long, &b"hello"[..]).unwrap();
        let xattr = ("SCHILY.xattr.user.mood", &b"calm"[..]);
        builder.append_pax_extensions([xattr, ("mtime", b"12.5"), ("path", b"renamed")]).unwrap();
        builder.append_data(&mut header, "short", &b"again"[..]).unwrap();
        let bytes = builder.into_inner().unwrap();

        let mut reader = TarReader::new(&bytes[..]);
        let first = reader.next().unwrap().unwrap();
        assert_eq!((first.path, first.mode, first.size), (long.into_bytes(), 0o4755, 5));
        let second = reader.next().unwrap().unwrap();
        assert_eq!(second.path, b"renamed");
        assert_eq!(second.mtime, (12, 500_000_000));
        assert_eq!(second.xattrs, [("user.mood".to_owned(), b"calm".to_vec())]);
        let mut content = String::new();
        reader.read_to_string(&mut content).unwrap();
        assert_eq!(content, "again");
        assert_eq!(&bytes[usize::try_from(second.offset).unwrap()..][..5], b"again");
        assert!(reader.next().unwrap().is_none());
    }

    #[test]
    fn a_giant_extended_header_takes_no_memory() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let bytes = header.as_bytes().to_vec();
        assert!(matches!(TarReader::new(&bytes[..]).next(), Err(TarError::Damaged(_))));
    }

    #[test]
    fn garbage_and_cut_archives_are_refused() {
        assert!(matches!(TarReader::new(&[7u8; 1024][..]).next(), Err(TarError::Damaged(_))));
        let mut header = tar::Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_size(9000);
        header.set_cksum();
        let bytes = header.as_bytes().to_vec();
        let mut reader = TarReader::new(&bytes[..]);
        assert!(reader.next().is_ok());
        assert!(matches!(reader.next(), Err(TarError::Damaged(_))));
    }
}
