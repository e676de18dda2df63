//! Signatures as AWS and botocore make them, and attacks that must not pass.

use serde::Deserialize;

use super::*;
use crate::access_key::AccessKey;

const NOW: u64 = 1_800_000_000;
const HOST: (&str, &[u8]) = ("host", b"nexus.example:8443");

fn at(secs: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(secs)
}

fn rules(service: &str) -> Rules<'_> {
    Rules {
        region: "eu-1",
        service,
        now: at(NOW),
        max_skew: DEFAULT_SKEW,
        allow_unsigned_body: service == "s3",
        must_sign: &["if-match"],
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().unwrap()
}

fn key() -> AccessKey {
    AccessKey {
        id: "CNXAABCDEFGHIJKLMNOP".parse().unwrap(),
        secret: "wJalrXUtnFEMI_K7MDENG-bPxRfiCYEXAMPLEKEY".parse().unwrap(),
    }
}

/// AWS's Signature Version 4 test suite: name, method, path, query, headers, signature.
#[test]
fn signatures_are_those_of_the_published_suite() {
    type Case<'a> = (&'a str, &'a str, &'a str, &'a str, &'a [(&'a str, &'a [u8])], &'a str);
    let cases: [Case<'_>; 11] = [
        ("get-vanilla", "GET", "/", "", &[], "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("post-vanilla", "POST", "/", "", &[], "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        (
            "get-vanilla-query-order-key-case",
            "GET",
            "/",
            "Param2=value2&Param1=value1",
            &[],
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        ("get-utf8", "GET", "/ሴ", "", &[], "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        (
            "get-unreserved",
            "GET",
            "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
            "",
            &[],
            "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
        ),
        (
            "get-relative",
            "GET",
            "/example/..",
            "",
            &[],
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        (
            "get-relative-relative",
            "GET",
            "/example1/example2/../..",
            "",
            &[],
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        ("get-slash", "GET", "//", "", &[], "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        (
            "get-slash-dot-slash",
            "GET",
            "/./",
            "",
            &[],
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        (
            "get-header-value-trim",
            "GET",
            "/",
            "",
            &[("My-Header1", b" value1"), ("My-Header2", b" \"a   b   c\"")],
            "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
        ),
        (
            "get-header-value-order",
            "GET",
            "/",
            "",
            &[
                ("My-Header1", b"value4"),
                ("My-Header1", b"value1"),
                ("My-Header1", b"value3"),
                ("My-Header1", b"value2"),
            ],
            "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01",
        ),
    ];
    for (name, method, path, query, more, signature) in cases {
        let mut headers: Vec<(&str, &[u8])> =
            vec![("Host", b"example.amazonaws.com"), ("X-Amz-Date", b"20150830T123600Z")];
        headers.extend_from_slice(more);
        let request = Request { method, path, query, headers: &headers };
        let scope = Scope { date: "20150830".into(), region: "us-east-1".into(), service: "service".into() };
        let pairs = canonical::pairs(query).unwrap();
        let secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
        let (_, made) =
            sign::signature(&request, &hex::encode(sha256(b"")), secret, "20150830T123600Z", &scope, &pairs).unwrap();
        assert_eq!(made, signature, "{name}");
    }
}

/// The examples of "Authenticating Requests" in the documentation of Amazon S3.
#[test]
fn signatures_are_those_of_the_s3_documentation() {
    let secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
    let scope = Scope { date: "20130524".into(), region: "us-east-1".into(), service: "s3".into() };
    let empty = hex::encode(sha256(b""));
    let host: (&str, &[u8]) = ("host", b"examplebucket.s3.amazonaws.com");
    let date: (&str, &[u8]) = ("x-amz-date", b"20130524T000000Z");
    let hash: (&str, &[u8]) = ("x-amz-content-sha256", empty.as_bytes());
    let made = |method: &str, path: &str, query: &str, headers: &[(&str, &[u8])], payload: &str| {
        let pairs = canonical::pairs(query).unwrap();
        sign::signature(&Request { method, path, query, headers }, payload, secret, "20130524T000000Z", &scope, &pairs)
            .unwrap()
            .1
    };
    assert_eq!(
        made("GET", "/test.txt", "", &[host, ("range", b"bytes=0-9"), hash, date], &empty),
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    );
    assert_eq!(
        made("GET", "/", "lifecycle", &[host, hash, date], &empty),
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
    );
    assert_eq!(
        made("GET", "/", "max-keys=2&prefix=J", &[host, hash, date], &empty),
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
    );
    let content = hex::encode(sha256(b"Welcome to Amazon S3."));
    let put = [
        ("date", b"Fri, 24 May 2013 00:00:00 GMT".as_slice()),
        host,
        ("x-amz-content-sha256", content.as_bytes()),
        date,
        ("x-amz-storage-class", b"REDUCED_REDUNDANCY"),
    ];
    assert_eq!(
        made("PUT", "/test$file.text", "", &put, &content),
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
    );
    let link = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2F\
                aws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host";
    assert_eq!(
        made("GET", "/test.txt", link, &[host], UNSIGNED),
        "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    );
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    service: String,
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    body: String,
}

/// Made by `tests/vectors/sigv4.py`.
#[test]
fn what_botocore_signs_is_accepted() {
    let vectors: Vec<Vector> = serde_json::from_str(include_str!("../../tests/vectors/sigv4.json")).unwrap();
    assert!(vectors.len() >= 12);
    for v in vectors {
        let headers: Vec<(&str, &[u8])> = v.headers.iter().map(|(k, v)| (k.as_str(), v.as_bytes())).collect();
        let request = Request { method: &v.method, path: &v.path, query: &v.query, headers: &headers };
        assert!(request.is_signed(), "{}", v.name);
        let presented = Presented::parse(&request).unwrap_or_else(|e| panic!("{}: {e}", v.name));
        assert_eq!(*presented.access_key(), key().id);
        let body = Some(sha256(v.body.as_bytes()));
        let verified = presented.verify(&request, &key().secret, &rules(&v.service), body);
        let verified = verified.unwrap_or_else(|e| panic!("{}: {e}", v.name));
        let link = v.query.contains("X-Amz-Signature");
        assert_eq!(verified.form, if link { Form::Presigned } else { Form::Header }, "{}", v.name);
        let unsigned = link && v.service == "s3";
        assert_eq!(verified.body, if unsigned { BodyCheck::Unsigned } else { BodyCheck::Done }, "{}", v.name);
        // The same request with another secret.
        let other = AccessKey::generate().secret;
        assert_eq!(presented.verify(&request, &other, &rules(&v.service), body), Err(SigV4Error::Signature));
    }
}

/// A request of our own, and what there is to change about it.
struct Sent {
    method: &'static str,
    path: String,
    query: String,
    headers: Vec<(String, Vec<u8>)>,
}

impl Sent {
    fn new(service: &str, body: Body) -> Self {
        let headers = vec![HOST, ("content-type", b"application/json".as_slice()), ("if-match", b"\"7\"")];
        let (path, query) = ("/v1/apps/web", "wait=30&sel=a%3Db");
        let request = Request { method: "PUT", path, query, headers: &headers };
        let added = sign(&request, body, &key(), "eu-1", service, at(NOW)).unwrap();
        let owned = headers.iter().map(|(k, v)| ((*k).to_owned(), v.to_vec()));
        let added = added.0.into_iter().map(|(k, v)| (k.to_owned(), v.into_bytes()));
        Self { method: "PUT", path: path.into(), query: query.into(), headers: owned.chain(added).collect() }
    }

    fn header(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.headers.iter_mut().find(|(k, _)| k == name).unwrap().1
    }

    fn replace(&mut self, name: &str, from: &str, to: &str) {
        let value = self.header(name);
        let text = String::from_utf8(value.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        *value = text.replacen(from, to, 1).into_bytes();
    }

    fn check(&self, rules: &Rules<'_>, body: Option<&[u8]>) -> Result<Verified, SigV4Error> {
        let headers: Vec<(&str, &[u8])> = self.headers.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
        let request = Request { method: self.method, path: &self.path, query: &self.query, headers: &headers };
        Presented::parse(&request)?.verify(&request, &key().secret, rules, body.map(sha256))
    }

    fn changed(change: impl FnOnce(&mut Self)) -> SigV4Error {
        let mut sent = Self::new("nexus", Body::Sha256(sha256(b"{}")));
        change(&mut sent);
        sent.check(&rules("nexus"), Some(b"{}")).unwrap_err()
    }
}

#[test]
fn what_we_sign_is_accepted_once() {
    let sent = Sent::new("nexus", Body::Sha256(sha256(b"{}")));
    let verified = sent.check(&rules("nexus"), Some(b"{}")).unwrap();
    assert_eq!((verified.form, verified.body), (Form::Header, BodyCheck::Done));
    assert_eq!(verified.usable_until, at(NOW) + DEFAULT_SKEW);
    assert_eq!(sent.check(&rules("nexus"), None).unwrap().body, BodyCheck::Sha256(sha256(b"{}")));
    assert_eq!(sent.check(&rules("nexus"), Some(b"{ }")), Err(SigV4Error::BodyMismatch));

    let mut replays = Replays::new(10);
    assert_eq!(replays.admit(&verified, at(NOW)), Ok(()));
    assert_eq!(replays.admit(&verified, at(NOW + 1)), Err(ReplayError::Replayed));
    let again = Sent::new("nexus", Body::Sha256(sha256(b"{}"))).check(&rules("nexus"), None).unwrap();
    assert_eq!(replays.admit(&again, at(NOW)), Ok(()), "an equal request that is signed anew is another one");

    let unsigned = Sent::new("s3", Body::Unsigned);
    assert_eq!(unsigned.check(&rules("s3"), None).unwrap().body, BodyCheck::Unsigned);
    let strict = Rules { allow_unsigned_body: false, ..rules("s3") };
    assert_eq!(unsigned.check(&strict, None), Err(SigV4Error::UnsignedBody));
}

#[test]
fn whatever_is_changed_on_the_way_is_noticed() {
    use SigV4Error as E;
    assert_eq!(Sent::changed(|s| s.method = "DELETE"), E::Signature);
    assert_eq!(Sent::changed(|s| s.path = "/v1/apps/db".into()), E::Signature);
    assert_eq!(Sent::changed(|s| s.path = "/v1/apps%2Fweb".into()), E::Signature);
    assert_eq!(Sent::changed(|s| s.path = "/v1/apps/w%65b".into()), E::Signature);
    assert_eq!(Sent::changed(|s| s.query.push_str("&force=true")), E::Signature);
    assert_eq!(Sent::changed(|s| s.query = "wait=31&sel=a%3Db".into()), E::Signature);
    assert_eq!(Sent::changed(|s| *s.header("if-match") = b"*".to_vec()), E::Signature);
    assert_eq!(Sent::changed(|s| *s.header("host") = b"evil.example".to_vec()), E::Signature);
    assert_eq!(Sent::changed(|s| *s.header("x-amz-nonce") = b"x".to_vec()), E::Signature);
    assert_eq!(Sent::changed(|s| s.replace("x-amz-date", "T08000", "T08001")), E::Signature);
    assert_eq!(
        Sent::changed(|s| s.replace("authorization", "Signature=", "Signature=0")),
        E::Malformed("the signature must be 64 hexadecimal digits in lower case")
    );
    assert_eq!(Sent::changed(|s| s.headers.push(("if-match".into(), b"*".to_vec()))), E::Signature);
    let zero = hex::encode([0; 32]);
    assert_eq!(Sent::changed(|s| *s.header("x-amz-content-sha256") = zero.into_bytes()), E::Signature);
    // The header is no longer among the signed ones, and may not be there unsigned.
    assert_eq!(Sent::changed(|s| s.replace("authorization", ";if-match", "")), E::UnsignedHeader("if-match".into()));
    assert_eq!(Sent::changed(|s| s.replace("authorization", ";host", "")), E::UnsignedHeader("host".into()));
    assert_eq!(
        Sent::changed(|s| s.headers.push(("X-Amz-Acl".into(), b"public".to_vec()))),
        E::UnsignedHeader("x-amz-acl".into())
    );
    assert_eq!(
        Sent::changed(|s| s.headers.retain(|(k, _)| k != "x-amz-nonce")),
        E::MissingHeader("x-amz-nonce".into())
    );
    for name in ["host", "x-amz-date", "x-amz-content-sha256", "authorization"] {
        let error = Sent::changed(|s| {
            let value = s.header(name).clone();
            s.headers.push((name.into(), value));
        });
        assert_eq!(error, E::Repeated(name.into()));
    }
    for path in
        ["/v1/./apps/web", "/v1/x/../apps/web", "//v1/apps/web", "/v1/apps//web", "/v1/%2e%2E/apps/web", "", "v1"]
    {
        assert_eq!(Sent::changed(|s| s.path = path.into()), E::Path, "{path}");
    }
    // What is not signed and does not matter may change.
    let mut sent = Sent::new("nexus", Body::Sha256(sha256(b"{}")));
    sent.headers.push(("x-forwarded-for".into(), b"10.0.0.1".to_vec()));
    assert!(sent.check(&rules("nexus"), None).is_ok());
}

#[test]
fn time_and_scope_bind() {
    let sent = Sent::new("nexus", Body::Sha256(sha256(b"")));
    let check = |change: &dyn Fn(&mut Rules<'_>)| {
        let mut rules = rules("nexus");
        change(&mut rules);
        sent.check(&rules, None).map(|_| ())
    };
    assert_eq!(check(&|r| r.now = at(NOW + 300)), Ok(()));
    assert_eq!(check(&|r| r.now = at(NOW - 300)), Ok(()));
    assert_eq!(check(&|r| r.now = at(NOW + 301)), Err(SigV4Error::Skewed(DEFAULT_SKEW)));
    assert_eq!(check(&|r| r.now = at(NOW - 301)), Err(SigV4Error::Skewed(DEFAULT_SKEW)));
    assert_eq!(
        check(&|r| (r.now, r.max_skew) = (at(NOW + 901), Duration::from_secs(86_400))),
        Err(SigV4Error::Skewed(MAX_SKEW)),
        "no configuration allows more"
    );
    assert!(matches!(check(&|r| r.region = "eu-2"), Err(SigV4Error::Scope { what: "region", .. })));
    assert!(matches!(check(&|r| r.service = "s3"), Err(SigV4Error::Scope { what: "service", .. })));
    assert!(matches!(
        Sent::changed(|s| s.replace("authorization", "/20270115/", "/20270116/")),
        SigV4Error::Scope { what: "day", .. }
    ));
}

#[test]
fn a_presigned_link_opens_until_it_expires() {
    let request = Request { method: "GET", path: "/bucket/a%20b", query: "versionId=7", headers: &[HOST] };
    let link =
        |service, body, secs| presign(&request, body, &key(), "eu-1", service, at(NOW), Duration::from_secs(secs));
    let check = |service: &str, query: &str, now: u64, body: Option<&[u8]>| {
        let request = Request { query, ..request };
        let rules = Rules { now: at(now), ..rules(service) };
        Presented::parse(&request)?.verify(&request, &key().secret, &rules, body.map(sha256))
    };
    let query = link("s3", Body::Unsigned, 3600).unwrap();
    let verified = check("s3", &query, NOW + 3600, None).unwrap();
    assert_eq!(
        (verified.form, verified.body, verified.usable_until),
        (Form::Presigned, BodyCheck::Unsigned, at(NOW + 3600))
    );
    assert_eq!(check("s3", &query, NOW + 3601, None), Err(SigV4Error::Expired));
    assert_eq!(check("s3", &query, NOW - 301, None), Err(SigV4Error::Skewed(DEFAULT_SKEW)));
    assert_eq!(check("s3", &query.replace("Expires=3600", "Expires=9999"), NOW, None), Err(SigV4Error::Signature));
    assert_eq!(check("s3", &query.replace("versionId=7", "versionId=8"), NOW, None), Err(SigV4Error::Signature));
    assert_eq!(check("s3", &format!("{query}&x=1"), NOW, None), Err(SigV4Error::Signature));
    assert_eq!(
        check("s3", &format!("{query}&X-Amz-Expires=9"), NOW, None),
        Err(SigV4Error::Repeated("X-Amz-Expires".into()))
    );
    for bad in ["0", "604801", "-1", "+60", "", "99999999999999999999"] {
        let query = query.replace("Expires=3600", &format!("Expires={bad}"));
        // A plus is a blank in a query, so that one is no number either.
        assert_eq!(check("s3", &query, NOW, None), Err(SigV4Error::Life(MAX_PRESIGNED)), "{bad}");
    }
    for body in [Body::Unsigned, Body::Sha256(sha256(b"x"))] {
        let query = link("s3", body, 60).unwrap();
        assert!(check("s3", &query, NOW, Some(b"x")).is_ok());
    }
    let query = link("nexus", Body::Sha256(sha256(b"")), 60).unwrap();
    assert_eq!(check("nexus", &query, NOW, Some(b"")).unwrap().body, BodyCheck::Done);
    assert_eq!(check("nexus", &query, NOW, Some(b"x")), Err(SigV4Error::Signature));
    assert_eq!(check("nexus", &query, NOW, None), Err(SigV4Error::BodyNeeded));
    assert_eq!(check("nexus", &link("nexus", Body::Unsigned, 60).unwrap(), NOW, None), Err(SigV4Error::UnsignedBody));
    assert_eq!(link("s3", Body::Unsigned, 0).unwrap_err(), SigV4Error::Life(MAX_PRESIGNED));
    assert_eq!(link("s3", Body::Unsigned, 604_801).unwrap_err(), SigV4Error::Life(MAX_PRESIGNED));
}

#[test]
fn unreadable_signatures_are_refused() {
    let authorization = |change: &dyn Fn(&str) -> String| {
        Sent::changed(|s| {
            let text = String::from_utf8(s.header("authorization").clone()).unwrap();
            *s.header("authorization") = change(&text).into_bytes();
        })
    };
    assert_eq!(authorization(&|_| "Bearer x".into()), SigV4Error::NotSigned);
    assert_eq!(authorization(&|t| t.replace("SHA256", "SHA1")), SigV4Error::NotSigned);
    assert_eq!(authorization(&|t| format!("{t}, Signature=0")), SigV4Error::Repeated("Signature".into()));
    let malformed: [&dyn Fn(&str) -> String; 9] = [
        &|_| format!("{ALGORITHM} x"),
        &|t| t.replace("Credential=", "credential="),
        &|t| t.replace("/aws4_request", "/aws5_request"),
        &|t| t.replace("/eu-1/", "/eu-1/x/"),
        &|t| t.replace("CNXA", "AKIA"),
        &|t| t.replace("host;if-match", "if-match;host"),
        &|t| t.replace("host;", "host;host;"),
        &|t| t.replace("host;", "Host;"),
        &|t| format!("{t}{}", "x".repeat(MAX_AUTHORIZATION)),
    ];
    for (i, change) in malformed.iter().enumerate() {
        assert!(matches!(authorization(change), SigV4Error::Malformed(_)), "{i}");
    }
    for stamp in [
        "",
        "20270115",
        "2027-01-15T08:00Z",
        "20270230T000000Z",
        "00000000T000000Z",
        "20270115T080060Z0",
        "２０270115T080000Z",
    ] {
        let error = Sent::changed(|s| *s.header("x-amz-date") = stamp.into());
        assert!(matches!(error, SigV4Error::Malformed(_)), "{stamp}: {error:?}");
    }
    let streaming =
        Sent::changed(|s| *s.header("x-amz-content-sha256") = b"STREAMING-AWS4-HMAC-SHA256-PAYLOAD".to_vec());
    assert_eq!(streaming, SigV4Error::Streaming);
    for query in ["a=%", "a=%2", "a=%zz"] {
        assert!(matches!(Sent::changed(|s| s.query = query.into()), SigV4Error::Malformed(_)));
    }
    assert!(matches!(Sent::changed(|s| s.query = "a&".repeat(501)), SigV4Error::Malformed(_)));
    assert!(matches!(Sent::changed(|s| s.query = "a".repeat(MAX_TARGET)), SigV4Error::Malformed(_)));
    assert!(matches!(Sent::changed(|s| s.query = "X-Amz-Signature=0".into()), SigV4Error::Malformed(_)));
    let plain = Request { method: "GET", path: "/", query: "", headers: &[HOST] };
    assert!(!plain.is_signed() && Presented::parse(&plain).is_err_and(|e| e == SigV4Error::NotSigned));
}
