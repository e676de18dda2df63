//! The canonical request: one text for all the ways in which HTTP lets the same request be written.
//!
//! As the AWS documentation has it ("Create a signed AWS API request"), with two decisions where it leaves room: `+` in a
//! query means a blank, because that is how servers read it, and a percent sign that starts no escape is refused.

use percent_encoding::{percent_decode, percent_encode};

use super::{Request, SigV4Error};
use crate::UNRESERVED;

/// Pairs of a query; more are refused, since each is sorted.
const MAX_PAIRS: usize = 500;

/// A name and value of a query, decoded.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// S3 takes the path as it is, each segment encoded once. Every other service drops empty and dot segments and encodes
/// what was sent once more.
pub(super) fn path(raw: &str, is_s3: bool) -> Result<String, SigV4Error> {
    if !is_s3 {
        let kept = normal(raw);
        return Ok(kept
            .split('/')
            .map(|s| percent_encode(s.as_bytes(), UNRESERVED).to_string())
            .collect::<Vec<_>>()
            .join("/"));
    }
    if raw.is_empty() {
        return Ok("/".to_owned());
    }
    // Segment by segment, so that an encoded slash stays one.
    let segments: Result<Vec<_>, _> = raw.split('/').map(|s| decoded(s).map(|d| encoded(&d))).collect();
    Ok(segments?.join("/"))
}

/// Without empty and dot segments.
fn normal(raw: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for segment in raw.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = kept.pop(),
            other => kept.push(other),
        }
    }
    let end = if raw.ends_with('/') && !kept.is_empty() { "/" } else { "" };
    format!("/{}{end}", kept.join("/"))
}

/// Whether the path means the same to the signature and to a router: neither drops anything from it.
pub(super) fn is_plain(raw: &str) -> bool {
    let dots = |s: &str| decoded(s).is_ok_and(|d| d == b"." || d == b"..");
    normal(raw) == raw && !raw.split('/').any(dots)
}

pub(super) fn pairs(query: &str) -> Result<Vec<Pair>, SigV4Error> {
    let found: Result<Vec<Pair>, _> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .take(MAX_PAIRS + 1)
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let blank = |text: &str| decoded(&text.replace('+', " "));
            Ok((blank(name)?, blank(value)?))
        })
        .collect();
    let found = found?;
    if found.len() > MAX_PAIRS { Err(SigV4Error::Malformed("the query has too many parameters")) } else { Ok(found) }
}

pub(super) fn query<'a>(pairs: impl Iterator<Item = &'a Pair>) -> String {
    let mut sorted: Vec<(String, String)> = pairs.map(|(k, v)| (encoded(k), encoded(v))).collect();
    sorted.sort();
    sorted.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("&")
}

/// The canonical headers of `names`, each with its line end. Every name must be there.
pub(super) fn headers(request: &Request<'_>, names: &[String]) -> Result<Vec<u8>, SigV4Error> {
    let mut out = Vec::new();
    for name in names {
        out.extend_from_slice(name.as_bytes());
        let mut found = false;
        for value in request.values(name) {
            if value.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
                return Err(SigV4Error::Malformed("a header's value holds control characters"));
            }
            out.push(if found { b',' } else { b':' });
            found = true;
            let words = value.split(|b| matches!(b, b' ' | b'\t')).filter(|w| !w.is_empty());
            for (i, word) in words.enumerate() {
                if i > 0 {
                    out.push(b' ');
                }
                out.extend_from_slice(word);
            }
        }
        if !found {
            return Err(SigV4Error::MissingHeader(name.clone()));
        }
        out.push(b'\n');
    }
    Ok(out)
}

pub(super) fn request(
    request: &Request<'_>,
    is_s3: bool,
    pairs: &[Pair],
    signed: &[String],
    payload: &str,
) -> Result<Vec<u8>, SigV4Error> {
    let path = path(request.path, is_s3)?;
    let unsigned = |(name, _): &&Pair| name != b"X-Amz-Signature";
    let query = query(pairs.iter().filter(unsigned));
    let mut out = format!("{}\n{path}\n{query}\n", request.method).into_bytes();
    out.extend(headers(request, signed)?);
    out.extend_from_slice(format!("\n{}\n{payload}", signed.join(";")).as_bytes());
    Ok(out)
}

pub(super) fn encoded(bytes: &[u8]) -> String {
    percent_encode(bytes, UNRESERVED).to_string()
}

fn decoded(text: &str) -> Result<Vec<u8>, SigV4Error> {
    let bytes = text.as_bytes();
    let is_hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let broken = bytes.iter().enumerate().any(|(i, b)| *b == b'%' && !(is_hex(i + 1) && is_hex(i + 2)));
    if broken {
        Err(SigV4Error::Malformed("a percent sign starts no escape"))
    } else {
        Ok(percent_decode(bytes).collect())
    }
}
