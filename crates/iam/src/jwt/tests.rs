//! Tokens that must open, and attacks that must not.

use ring::hmac;

use super::*;

const NOW: u64 = 1_800_000_000;
const EXPECTED: Expectations<'_> = Expectations {
    issuer: "https://cloud.example",
    audience: "nexus-api",
    now: SystemTime::UNIX_EPOCH,
    leeway: Duration::from_secs(5),
};

fn at(secs: u64) -> Expectations<'static> {
    Expectations { now: SystemTime::UNIX_EPOCH + Duration::from_secs(secs), ..EXPECTED }
}

fn claims() -> Claims {
    Claims {
        iss: EXPECTED.issuer.into(),
        sub: "user:ann".into(),
        aud: EXPECTED.audience.into(),
        exp: NOW + 900,
        nbf: NOW,
        iat: NOW,
        jti: random_id(),
        sid: "session-1".into(),
        org: "acme".into(),
        groups: vec!["admins".into()],
        project: None,
        amr: vec!["pwd".into(), "otp".into()],
        act: Some(Actor { sub: "service:ci".into(), act: None }),
    }
}

fn key_and_set() -> (SigningKey, KeySet) {
    let key = SigningKey::generate().unwrap();
    let set = [key.public().clone()].into_iter().collect();
    (key, set)
}

/// A token with this header and payload, rightly signed.
fn forged(key: &SigningKey, header: Value, payload: &Claims) -> String {
    key.sign_parts(&header.to_string(), &serde_json::to_string(payload).unwrap())
}

fn header(key: &SigningKey) -> Value {
    json!({"alg": "EdDSA", "typ": "at+jwt", "kid": key.kid()})
}

#[test]
fn a_token_says_what_was_signed() {
    let (key, set) = key_and_set();
    let claims = claims();
    let token = key.sign(&claims).unwrap();
    assert_eq!(verify(&token, &set, at(NOW)).unwrap(), claims);
    let published = KeySet::from_jwks(set.to_jwks().to_string().as_bytes()).unwrap();
    let again = SigningKey::from_pem(key.to_pem()).unwrap();
    assert_eq!(again.kid(), key.kid());
    assert_eq!(verify(&again.sign(&claims).unwrap(), &published, at(NOW)).unwrap(), claims);
    let read: KeySet = serde_json::from_str(&serde_json::to_string(&set).unwrap()).unwrap();
    assert_eq!(read, set);
    assert!(!format!("{key:?}").contains("PRIVATE"));
}

/// RFC 8037, appendices A.1 to A.4.
#[test]
fn keys_and_signatures_are_those_of_the_rfc() {
    let seed = jws::decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A", "d").unwrap();
    let public: [u8; 32] = jws::decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "x").unwrap().try_into().unwrap();
    let pair = Ed25519KeyPair::from_seed_and_public_key(&seed, &public).unwrap();
    let key = SigningKey { pair, pem: Zeroizing::default(), public: VerifyingKey::new(public) };
    assert_eq!(key.kid(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    assert_eq!(
        key.sign_parts(r#"{"alg":"EdDSA"}"#, "Example of Ed25519 signing"),
        "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
    );
}

#[test]
fn tokens_open_only_in_their_time_and_place() {
    let (key, set) = key_and_set();
    let token = key.sign(&claims()).unwrap();
    let check = |expected| verify(&token, &set, expected).map(|_| ());
    assert_eq!(check(at(NOW - 5)), Ok(()));
    assert_eq!(check(at(NOW - 6)), Err(JwtError::NotYet));
    assert_eq!(check(at(NOW + 904)), Ok(()));
    assert_eq!(check(at(NOW + 905)), Err(JwtError::Expired));
    assert_eq!(check(Expectations { issuer: "https://cloud.example/", ..at(NOW) }), Err(JwtError::Issuer));
    assert_eq!(check(Expectations { audience: "nexus", ..at(NOW) }), Err(JwtError::Audience));
    let future = Claims { nbf: 0, iat: NOW + 60, ..claims() };
    assert_eq!(verify(&key.sign(&future).unwrap(), &set, at(NOW)), Err(JwtError::NotYet));
    let endless = Claims { exp: u64::MAX, ..claims() };
    assert!(verify(&key.sign(&endless).unwrap(), &set, at(NOW)).is_ok());
    let backwards = Claims { exp: NOW, iat: NOW, ..claims() };
    assert!(matches!(verify(&key.sign(&backwards).unwrap(), &set, at(NOW)), Err(JwtError::Claims(_))));
}

#[test]
fn a_token_does_not_choose_its_algorithm() {
    let (key, set) = key_and_set();
    let payload = jws::encode(serde_json::to_string(&claims()).unwrap());
    for alg in ["none", "None", "NONE", "", "HS256", "RS256", "ES256", "eddsa", "Ed25519"] {
        let header = jws::encode(json!({"alg": alg, "typ": "at+jwt", "kid": key.kid()}).to_string());
        let signed = format!("{header}.{payload}");
        // Key confusion: what everybody knows, the public key, taken as the secret of a MAC.
        let mac =
            |secret: &[u8]| jws::encode(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes()));
        let x = jws::encode(key.public().as_bytes());
        let pem = set.to_jwks().to_string();
        for signature in [String::new(), mac(key.public().as_bytes()), mac(x.as_bytes()), mac(pem.as_bytes()), mac(b"")]
        {
            let outcome = verify(&format!("{signed}.{signature}"), &set, at(NOW));
            assert_eq!(outcome, Err(JwtError::Algorithm(alg.into())), "{alg}");
        }
    }
    // EdDSA is claimed, a MAC is given.
    let signed = format!("{}.{payload}", jws::encode(header(&key).to_string()));
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA512, key.public().as_bytes()), signed.as_bytes());
    for signature in [jws::encode(mac), String::new(), jws::encode([0; 64])] {
        assert_eq!(verify(&format!("{signed}.{signature}"), &set, at(NOW)), Err(JwtError::Signature));
    }
}

#[test]
fn headers_that_are_not_ours_are_refused() {
    let (key, set) = key_and_set();
    let with = |name: &str, value: Value| {
        let mut header = header(&key);
        header[name] = value;
        verify(&forged(&key, header, &claims()), &set, at(NOW)).unwrap_err()
    };
    assert_eq!(with("crit", json!(["b64"])), JwtError::Critical);
    assert_eq!(with("crit", json!([])), JwtError::Critical);
    for typ in [json!("JWT"), json!("dpop+jwt"), json!(null), json!(["at+jwt"])] {
        assert_eq!(with("typ", typ), JwtError::Type);
    }
    for (name, value) in [
        ("jwk", key.public().to_jwk()),
        ("jku", json!("https://evil.example/jwks")),
        ("x5u", json!("https://evil.example/cert")),
        ("x5c", json!([])),
        ("b64", json!(false)),
        ("zip", json!("DEF")),
    ] {
        assert_eq!(with(name, value), JwtError::Header(name.into()));
    }
    for kid in [json!(""), json!("../../dev/null"), json!(null), json!(7), json!("' OR 1=1")] {
        assert_eq!(with("kid", kid), JwtError::UnknownKey);
    }
    let mut twice = format!(r#"{{"alg":"none","alg":"EdDSA","typ":"at+jwt","kid":"{}"}}"#, key.kid());
    let payload = serde_json::to_string(&claims()).unwrap();
    assert!(matches!(verify(&key.sign_parts(&twice, &payload), &set, at(NOW)), Err(JwtError::Malformed(_))));
    twice = payload.replacen(r#""sub":"#, r#""sub":"user:root","sub":"#, 1);
    let outcome = verify(&key.sign_parts(&header(&key).to_string(), &twice), &set, at(NOW));
    assert!(matches!(outcome, Err(JwtError::Claims(_))), "{outcome:?}");
}

#[test]
fn another_servers_key_opens_nothing() {
    let (key, set) = key_and_set();
    let (other, other_set) = key_and_set();
    assert_eq!(verify(&other.sign(&claims()).unwrap(), &set, at(NOW)), Err(JwtError::UnknownKey));
    // Signed by the other, under the name of ours.
    assert_eq!(verify(&forged(&other, header(&key), &claims()), &set, at(NOW)), Err(JwtError::Signature));
    // A set in which the other's key stands under the name of ours.
    let mut poisoned = other_set.to_jwks();
    poisoned["keys"][0]["kid"] = json!(key.kid());
    assert!(matches!(KeySet::from_jwks(poisoned.to_string().as_bytes()), Err(KeyError::Set(_))));
    let mut retired = set.clone();
    retired.remove(key.kid());
    assert_eq!(verify(&key.sign(&claims()).unwrap(), &retired, at(NOW)), Err(JwtError::UnknownKey));
}

#[test]
fn changed_tokens_are_refused() {
    let (key, set) = key_and_set();
    let token = key.sign(&claims()).unwrap();
    for length in 0..token.len() {
        assert!(verify(&token[..length], &set, at(NOW)).is_err(), "cut at {length}");
    }
    for place in 0..token.len() {
        let other = if token.as_bytes()[place] == b'A' { "B" } else { "A" };
        let mut changed = token.clone();
        changed.replace_range(place..=place, other);
        assert!(verify(&changed, &set, at(NOW)).is_err(), "changed at {place}");
    }
    let parts: Vec<_> = token.split('.').collect();
    let payload = jws::encode(serde_json::to_string(&Claims { sub: "user:root".into(), ..claims() }).unwrap());
    assert_eq!(verify(&[parts[0], &payload, parts[2]].join("."), &set, at(NOW)), Err(JwtError::Signature));
    // Two signatures, in either serialization.
    assert!(matches!(verify(&format!("{token}.{}", parts[2]), &set, at(NOW)), Err(JwtError::Malformed(_))));
    let json = json!({"payload": parts[1], "signatures": [{"protected": parts[0], "signature": parts[2]}, {"protected": parts[0], "signature": parts[2]}]});
    assert!(matches!(verify(&json.to_string(), &set, at(NOW)), Err(JwtError::Malformed(_))));
    for noise in [format!(" {token}"), format!("{token}\n"), format!("{token}="), token.to_uppercase()] {
        assert!(verify(&noise, &set, at(NOW)).is_err());
    }
    assert_eq!(verify(&"a.".repeat(MAX_TOKEN), &set, at(NOW)), Err(JwtError::TooLong(MAX_TOKEN * 2)));
}

#[test]
fn sets_and_tokens_are_bounded() {
    let (key, mut set) = key_and_set();
    for n in 1..MAX_KEYS {
        set.insert(VerifyingKey::new([n as u8; 32])).unwrap();
    }
    assert_eq!(set.insert(VerifyingKey::new([255; 32])), Err(KeyError::TooMany));
    assert_eq!(set.insert(key.public().clone()), Ok(()));
    let crowded = Claims { groups: vec!["g".repeat(100); 100], ..claims() };
    assert_eq!(key.sign(&crowded), Err(KeyError::TooLong));
    let mut act = Actor { sub: "a".into(), act: None };
    for _ in 0..MAX_ACTORS {
        act = Actor { sub: "a".into(), act: Some(Box::new(act)) };
    }
    let chained = key.sign(&Claims { act: Some(act), ..claims() }).unwrap();
    assert!(matches!(verify(&chained, &set, at(NOW)), Err(JwtError::Claims(_))));
    for bad in [
        json!({}),
        json!({"keys": {}}),
        json!({"keys": [{"kty": "oct", "k": "AA"}]}),
        json!({"keys": [{"kty": "OKP", "crv": "X25519", "x": jws::encode([1; 32])}]}),
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA"}]}),
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": jws::encode([1; 32]), "d": jws::encode([1; 32])}]}),
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": jws::encode([1; 32]), "alg": "HS256"}]}),
    ] {
        assert!(KeySet::from_jwks(bad.to_string().as_bytes()).is_err(), "{bad}");
    }
    assert!(SigningKey::from_pem("nothing").is_err());
    let p256 = KeyPair::generate().unwrap().serialize_pem();
    assert_eq!(SigningKey::from_pem(&p256).unwrap_err(), KeyError::Unreadable);
}
