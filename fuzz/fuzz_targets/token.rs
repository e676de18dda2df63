//! Tokens, ours and other providers', and what else the sign-in endpoints read.
//!
//! The first byte chooses. Where a signature would stop the fuzzer at the door, the input is signed first, so that what
//! lies behind the door is reached too.
#![no_main]

use std::hint::black_box;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libfuzzer_sys::fuzz_target;
use nexus_iam::envelope::{Context, FileKeys, Sealed, open};
use nexus_iam::federation::{
    Discovery, ExchangeRequest, GroupMapping, IdTokenRules, IssuerUrl, Plaintext, ProviderKeys, TokenAnswer,
    verify_id_token,
};
use nexus_iam::jwt::{Claims, Expectations, KeySet, VerifyingKey, verify};
use nexus_iam::password::PasswordHash;
use nexus_iam::totp::{RecoveryCodes, TotpSecret};
use nexus_iam::{SpiffeId, TokenHash, TokenSecret};
use ring::signature::{Ed25519KeyPair, KeyPair};

struct World {
    pair: Ed25519KeyPair,
    kid: String,
    keys: KeySet,
    provider: ProviderKeys,
    issuer: IssuerUrl,
    groups: GroupMapping,
    masters: FileKeys,
    totp: TotpSecret,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("a seed has 32 bytes");
    let public = VerifyingKey::new(pair.public_key().as_ref().try_into().expect("a key has 32 bytes"));
    let kid = public.kid().to_owned();
    let keys: KeySet = [public].into_iter().collect();
    let provider = ProviderKeys::parse(keys.to_jwks().to_string().as_bytes()).expect("our keys can be read");
    World {
        pair,
        kid,
        keys,
        provider,
        issuer: IssuerUrl::parse("https://i", Plaintext::Never).expect("it is a URL"),
        groups: GroupMapping { claim: "/a/b".into(), table: Default::default() },
        masters: FileKeys::generate(),
        totp: TotpSecret::generate(),
    }
});

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn signed(header: &[u8], payload: &[u8]) -> String {
    let text = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
    let signature = WORLD.pair.sign(text.as_bytes());
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn access(token: &str) -> Option<Claims> {
    let expected = Expectations { issuer: "i", audience: "a", now: now(), leeway: Duration::from_secs(5) };
    verify(token, &WORLD.keys, expected).ok()
}

fn id(token: &str) {
    let rules = IdTokenRules {
        issuer: "https://i",
        client_id: "a",
        nonce: None,
        access_token: Some("t"),
        now: now(),
        leeway: Duration::from_secs(5),
        max_age: Duration::from_secs(600),
    };
    if let Ok(token) = verify_id_token(token, &WORLD.provider, &rules) {
        let _ = black_box(WORLD.groups.groups(&token.claims));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    let header = format!(r#"{{"alg":"EdDSA","typ":"at+jwt","kid":"{}"}}"#, WORLD.kid);
    match choice % 6 {
        0 => {
            let Ok(text) = std::str::from_utf8(rest) else { return };
            if let Ok(secret) = TokenSecret::parse(text) {
                assert_eq!(secret.reveal(), text.trim(), "one token has one text");
            }
            let _ = black_box((text.parse::<TokenHash>(), text.parse::<SpiffeId>(), text.parse::<PasswordHash>()));
            let _ = black_box((WORLD.totp.verify(text, now(), None), RecoveryCodes::default().consume(text)));
            let _ = black_box(FileKeys::parse(text));
            access(text);
            id(text);
        }
        1 => {
            if let Some(claims) = access(&signed(header.as_bytes(), rest)) {
                assert_eq!((claims.iss.as_str(), claims.aud.as_str()), ("i", "a"));
                assert!(claims.exp + 5 > 1_800_000_000 && !claims.sid.is_empty());
            }
        }
        2 => {
            let claims =
                br#"{"iss":"i","aud":"a","sub":"s","exp":1800000900,"nbf":0,"iat":1,"jti":"j","sid":"s","org":"o"}"#;
            access(&signed(rest, claims));
        }
        3 => id(&signed(br#"{"alg":"EdDSA"}"#, rest)),
        4 => id(&signed(rest, br#"{"iss":"https://i","aud":"a","sub":"s","exp":1800000900,"iat":1799999999}"#)),
        _ => {
            if let Ok(keys) = KeySet::from_jwks(rest) {
                let again = KeySet::from_jwks(keys.to_jwks().to_string().as_bytes());
                assert_eq!(again.as_ref(), Ok(&keys));
            }
            let _ = black_box((ProviderKeys::parse(rest), Discovery::parse(rest, &WORLD.issuer)));
            let _ = black_box((TokenAnswer::parse(rest), ExchangeRequest::from_form(rest)));
            if let Ok(sealed) = serde_json::from_slice::<Sealed>(rest) {
                assert!(open(&WORLD.masters, &Context::totp("u"), &sealed).is_err(), "nobody knows the key");
            }
        }
    }
});
