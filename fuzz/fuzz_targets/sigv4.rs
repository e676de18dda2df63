//! Signed requests. The input is a request as text: method, path, query, then a header a line.
//!
//! Nothing that a stranger writes may pass, and what we sign ourselves may be refused by a rule but never for its
//! signature: signer and checker must see the same request.
#![no_main]

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use nexus_iam::access_key::AccessKey;
use nexus_iam::sigv4::{Body, DEFAULT_SKEW, Presented, Request, Rules, SigV4Error, presign, sign};

static KEY: LazyLock<AccessKey> = LazyLock::new(|| AccessKey {
    id: "CNXAABCDEFGHIJKLMNOP".parse().expect("it has the form of an id"),
    secret: "0123456789012345678901234567890123456789".parse().expect("it has the form of a secret"),
});
static OTHER: LazyLock<AccessKey> = LazyLock::new(AccessKey::generate);

fn check(request: &Request<'_>, key: &AccessKey, service: &str) -> Result<(), SigV4Error> {
    let rules = Rules {
        region: "r",
        service,
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        max_skew: DEFAULT_SKEW,
        allow_unsigned_body: true,
        must_sign: &["if-match"],
    };
    Presented::parse(request)?.verify(request, &key.secret, &rules, Some([0; 32])).map(|_| ())
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.split('\n');
    let (Some(method), Some(path), Some(query)) = (lines.next(), lines.next(), lines.next()) else { return };
    // What HTTP itself does not let through can't arrive.
    if !is_name(method) {
        return;
    }
    let headers: Vec<(&str, &[u8])> = lines
        .filter_map(|l| l.split_once(':'))
        .filter(|(name, _)| is_name(name))
        .map(|(name, value)| (name, value.as_bytes()))
        .collect();
    let request = Request { method, path, query, headers: &headers };
    for service in ["s3", "nexus"] {
        assert!(check(&request, &OTHER, service).is_err(), "nobody knows the secret");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        for body in [Body::Unsigned, Body::Sha256([0; 32])] {
            if let Ok(added) = sign(&request, body, &KEY, "r", service, now) {
                let mut all = headers.clone();
                all.extend(added.0.iter().map(|(k, v)| (*k, v.as_bytes())));
                let outcome = check(&Request { headers: &all, ..request }, &KEY, service);
                assert_ne!(outcome, Err(SigV4Error::Signature));
            }
            if let Ok(link) = presign(&request, body, &KEY, "r", service, now, Duration::from_secs(60)) {
                let outcome = check(&Request { query: &link, ..request }, &KEY, service);
                assert_ne!(outcome, Err(SigV4Error::Signature));
            }
        }
    }
});
