//! A provider of our own with every kind of key, and what must not pass for its tokens.

use std::time::{Duration, SystemTime};

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256,
    RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
};
use ring::{digest, hmac};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Map, Value, json};

use super::*;
use crate::jwt::jws;

const NOW: u64 = 1_800_000_000;
const ISSUER: &str = "https://login.example/tenant";
const CLIENT: &str = "nexus";

struct Provider {
    rsa: RsaKeyPair,
    ec: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

impl Provider {
    fn new() -> Self {
        let rng = SystemRandom::new();
        let pem = include_bytes!("../../tests/vectors/rsa-2048.pem");
        let rsa = PrivatePkcs8KeyDer::from_pem_slice(pem).unwrap();
        let ec = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &rng).unwrap();
        let ed = Ed25519KeyPair::generate_pkcs8(&rng).unwrap();
        Self {
            rsa: RsaKeyPair::from_pkcs8(rsa.secret_pkcs8_der()).unwrap(),
            ec: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, ec.as_ref(), &rng).unwrap(),
            ed: Ed25519KeyPair::from_pkcs8(ed.as_ref()).unwrap(),
        }
    }

    fn jwks(&self) -> Value {
        let public: RsaPublicKeyComponents<Vec<u8>> = self.rsa.public().into();
        let point = self.ec.public_key().as_ref();
        json!({"keys": [
            {"kty": "RSA", "kid": "r", "use": "sig",
             "n": jws::encode(public.n),
             "e": jws::encode(public.e)},
            {"kty": "EC", "crv": "P-256", "kid": "e", "alg": "ES256",
             "x": jws::encode(&point[1..33]), "y": jws::encode(&point[33..])},
            {"kty": "OKP", "crv": "Ed25519", "kid": "d", "key_ops": ["verify"], "x": jws::encode(self.ed.public_key())},
        ]})
    }

    fn keys(&self) -> ProviderKeys {
        ProviderKeys::parse(self.jwks().to_string().as_bytes()).unwrap()
    }

    fn rsa_sign(&self, padding: &'static dyn RsaEncoding, text: &str) -> Vec<u8> {
        let mut out = vec![0; self.rsa.public().modulus_len()];
        self.rsa.sign(padding, &SystemRandom::new(), text.as_bytes(), &mut out).unwrap();
        out
    }

    fn sign(&self, header: &Value, payload: &str) -> String {
        let text = format!("{}.{}", jws::encode(header.to_string()), jws::encode(payload));
        let signature = match header["alg"].as_str().unwrap() {
            "RS256" => self.rsa_sign(&RSA_PKCS1_SHA256, &text),
            "PS256" => self.rsa_sign(&RSA_PSS_SHA256, &text),
            "ES256" => self.ec.sign(&SystemRandom::new(), text.as_bytes()).unwrap().as_ref().to_vec(),
            "EdDSA" => self.ed.sign(text.as_bytes()).as_ref().to_vec(),
            other => panic!("{other}"),
        };
        format!("{text}.{}", jws::encode(signature))
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": "EdDSA", "kid": "d", "typ": "JWT"}), &claims.to_string())
    }
}

fn rules() -> IdTokenRules<'static> {
    IdTokenRules {
        issuer: ISSUER,
        client_id: CLIENT,
        nonce: Some("n-1"),
        access_token: None,
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(NOW),
        leeway: Duration::from_secs(30),
        max_age: Duration::from_secs(600),
    }
}

fn claims() -> Value {
    json!({"iss": ISSUER, "sub": "u-1", "aud": CLIENT, "exp": NOW + 300, "iat": NOW, "nonce": "n-1",
           "email": "ann@example.com", "email_verified": true, "groups": ["dev", "ops"], "amr": ["pwd", "otp"]})
}

fn with(key: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[key] = value;
    claims
}

#[test]
fn a_token_by_each_kind_of_key_is_taken() {
    let provider = Provider::new();
    let keys = provider.keys();
    assert_eq!(keys.len(), 3);
    for (alg, kid) in [("RS256", "r"), ("PS256", "r"), ("ES256", "e"), ("EdDSA", "d")] {
        for header in [json!({"alg": alg, "kid": kid, "typ": "JWT"}), json!({"alg": alg})] {
            let token = provider.sign(&header, &claims().to_string());
            let id = verify_id_token(&token, &keys, &rules()).unwrap_or_else(|e| panic!("{alg}: {e}"));
            assert_eq!((id.subject.issuer.as_str(), id.subject.subject.as_str()), (ISSUER, "u-1"));
            assert_eq!((id.email.as_deref(), id.email_verified), (Some("ann@example.com"), true));
            assert_eq!(id.amr, ["pwd", "otp"]);
            // The signature of another text.
            let (text, _) = token.rsplit_once('.').unwrap();
            let other = provider.sign(&header, &with("sub", json!("u-2")).to_string());
            let mixed = format!("{text}.{}", other.rsplit_once('.').unwrap().1);
            assert_eq!(verify_id_token(&mixed, &keys, &rules()), Err(FederationError::Signature), "{alg}");
        }
        // Under the name of a key of another kind.
        let kid = if kid == "d" { "r" } else { "d" };
        let token = provider.sign(&json!({"alg": alg, "kid": kid}), &claims().to_string());
        assert_eq!(verify_id_token(&token, &keys, &rules()), Err(FederationError::UnknownKey));
    }
}

#[test]
fn a_token_does_not_choose_how_it_is_checked() {
    let provider = Provider::new();
    let (keys, jwks) = (provider.keys(), provider.jwks());
    for alg in ["none", "HS256", "HS512", "RS1", "ES512", "", "rs256"] {
        let text = format!(
            "{}.{}",
            jws::encode(json!({"alg": alg, "kid": "r"}).to_string()),
            jws::encode(claims().to_string())
        );
        let secrets = [jwks["keys"][0]["n"].as_str().unwrap().to_owned(), jwks.to_string(), String::new()];
        for secret in secrets {
            let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), text.as_bytes());
            for signature in [jws::encode(mac), String::new()] {
                let outcome = verify_id_token(&format!("{text}.{signature}"), &keys, &rules());
                assert_eq!(outcome, Err(FederationError::Algorithm(alg.into())));
            }
        }
    }
    let header = |key: &str, value: Value| {
        let mut header = json!({"alg": "EdDSA", "kid": "d"});
        header[key] = value;
        verify_id_token(&provider.sign(&header, &claims().to_string()), &keys, &rules()).map(|_| ())
    };
    assert_eq!(header("crit", json!(["exp"])), Err(FederationError::Critical));
    assert_eq!(header("typ", json!("at+jwt")), Err(FederationError::Type));
    assert_eq!(header("typ", json!("logout+jwt")), Err(FederationError::Type));
    assert_eq!(header("kid", json!("unknown")), Err(FederationError::UnknownKey));
    assert_eq!(header("kid", json!(7)), Err(FederationError::UnknownKey));
    // A key that the token brings along is not looked at.
    let stranger = Provider::new();
    let token =
        stranger.sign(&json!({"alg": "EdDSA", "kid": "d", "jwk": stranger.jwks()["keys"][2]}), &claims().to_string());
    assert_eq!(verify_id_token(&token, &keys, &rules()), Err(FederationError::Signature));
    // Two keys fit and the token names none.
    let mut two = provider.jwks();
    two["keys"].as_array_mut().unwrap().push(stranger.jwks()["keys"][2].clone());
    two["keys"][3]["kid"] = json!("d2");
    let two = ProviderKeys::parse(two.to_string().as_bytes()).unwrap();
    let nameless = provider.sign(&json!({"alg": "EdDSA"}), &claims().to_string());
    assert_eq!(verify_id_token(&nameless, &two, &rules()), Err(FederationError::UnknownKey));
    assert!(verify_id_token(&provider.token(&claims()), &two, &rules()).is_ok());
}

#[test]
fn claims_must_fit() {
    use FederationError as E;
    let provider = Provider::new();
    let keys = provider.keys();
    let check = |claims: Value| verify_id_token(&provider.token(&claims), &keys, &rules()).map(|_| ());
    let ok = Ok(());
    assert_eq!(check(claims()), ok);
    for (key, value, outcome) in [
        ("iss", json!("https://login.example/tenant/"), Err(E::Issuer)),
        ("iss", json!(null), Err(E::Claim("iss"))),
        ("sub", json!(""), Err(E::Claim("sub"))),
        ("sub", json!(7), Err(E::Claim("sub"))),
        ("sub", json!("x".repeat(256)), Err(E::Claim("sub"))),
        ("aud", json!("other"), Err(E::Audience)),
        ("aud", json!(["nexus"]), ok.clone()),
        ("aud", json!(["other"]), Err(E::Audience)),
        ("aud", json!([]), Err(E::Audience)),
        ("aud", json!(["nexus", "other"]), Err(E::Audience)),
        ("aud", json!(["nexus", 7]), Err(E::Claim("aud"))),
        ("aud", json!({"nexus": 1}), Err(E::Claim("aud"))),
        ("azp", json!("nexus"), ok.clone()),
        ("azp", json!("other"), Err(E::Audience)),
        ("exp", json!(NOW - 30), Err(E::Expired)),
        ("exp", json!(NOW - 29), ok.clone()),
        ("exp", json!(NOW as f64 + 0.5), ok.clone()),
        ("exp", json!("99999999999"), Err(E::Claim("exp"))),
        ("exp", json!(-1), Err(E::Claim("exp"))),
        ("exp", json!(null), Err(E::Claim("exp"))),
        ("iat", json!(NOW + 31), Err(E::NotYet)),
        ("iat", json!(NOW - 631), Err(E::TooOld)),
        ("iat", json!([]), Err(E::Claim("iat"))),
        ("nbf", json!(NOW + 31), Err(E::NotYet)),
        ("nbf", json!("soon"), Err(E::Claim("nbf"))),
        ("nonce", json!("n-2"), Err(E::Nonce)),
        ("nonce", json!(null), Err(E::Nonce)),
        ("email", json!({"a": 1}), ok.clone()),
    ] {
        assert_eq!(check(with(key, value.clone())), outcome, "{key}: {value}");
    }
    let mut both = with("aud", json!(["nexus", "other"]));
    both["azp"] = json!("nexus");
    assert_eq!(check(both), ok);
    let end_of_time = verify_id_token(&provider.token(&with("exp", json!(u64::MAX))), &keys, &rules());
    assert_eq!(end_of_time, Err(E::Claim("exp")));
    let twice = claims().to_string().replacen(r#""sub":"#, r#""sub":"root","sub":"#, 1);
    let token = provider.sign(&json!({"alg": "EdDSA", "kid": "d"}), &twice);
    assert!(matches!(verify_id_token(&token, &keys, &rules()), Err(E::Malformed(_))));
    let long = "x".repeat(40_000);
    assert!(matches!(verify_id_token(&long, &keys, &rules()), Err(E::TooLong { .. })));
    let no_browser = IdTokenRules { nonce: None, ..rules() };
    assert!(verify_id_token(&provider.token(&with("nonce", json!(null))), &keys, &no_browser).is_ok());
}

#[test]
fn an_access_token_of_another_sign_in_is_noticed() {
    let provider = Provider::new();
    let keys = provider.keys();
    let half = |by, text: &str| {
        let hash = digest::digest(by, text.as_bytes());
        jws::encode(&hash.as_ref()[..hash.as_ref().len() / 2])
    };
    let rules = IdTokenRules { access_token: Some("a-1"), ..rules() };
    for (alg, kid, by) in [("ES256", "e", &digest::SHA256), ("EdDSA", "d", &digest::SHA512)] {
        let header = json!({"alg": alg, "kid": kid});
        let token = |hash: Value| provider.sign(&header, &with("at_hash", hash).to_string());
        assert!(verify_id_token(&token(json!(half(by, "a-1"))), &keys, &rules).is_ok(), "{alg}");
        for bad in [json!(half(by, "a-2")), json!(null), json!("")] {
            assert_eq!(verify_id_token(&token(bad), &keys, &rules), Err(FederationError::AtHash));
        }
    }
    // The example of OIDC Core 1.0, appendix A.3.
    assert_eq!(half(&digest::SHA256, "jHkWEdUXMU1BwAsC4vtUsZwnNvTIxEl0z9K3vx5KF0Y"), "77QmUPtjPfzWtF2AnpK9RQ");
}

#[test]
fn keys_that_can_not_check_are_passed_over() {
    let provider = Provider::new();
    let mut jwks = provider.jwks();
    let list = jwks["keys"].as_array_mut().unwrap();
    let rsa = list[0].clone();
    list.clear();
    for (key, value) in [
        ("use", json!("enc")),
        ("alg", json!("RS512")),
        ("alg", json!("HS256")),
        ("n", json!("%%")),
        ("kid", json!(1)),
        ("kty", json!("oct")),
        ("key_ops", json!(["sign"])),
    ] {
        let mut jwk = rsa.clone();
        jwk[key] = value;
        list.push(jwk);
    }
    list.push(json!({"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA"}));
    list.push(json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}));
    list.push(json!("nonsense"));
    assert!(ProviderKeys::parse(jwks.to_string().as_bytes()).unwrap().is_empty());
    // A modulus of 1024 bits is read and checks nothing.
    let weak = json!({"keys": [{"kty": "RSA", "n": jws::encode([255; 128]), "e": "AQAB"}]});
    let weak = ProviderKeys::parse(weak.to_string().as_bytes()).unwrap();
    let token = provider.sign(&json!({"alg": "RS256"}), &claims().to_string());
    assert_eq!(verify_id_token(&token, &weak, &rules()), Err(FederationError::Signature));
    for bad in ["", "[]", "{}", r#"{"keys": {}}"#, r#"{"keys": [], "keys": []}"#] {
        assert!(ProviderKeys::parse(bad.as_bytes()).is_err());
    }
    let many = json!({"keys": vec![json!({}); 101]});
    assert!(ProviderKeys::parse(many.to_string().as_bytes()).is_err());
    assert!(ProviderKeys::parse(&vec![b' '; MAX_PROVIDER_JWKS + 1]).is_err());
}

fn document() -> Value {
    json!({"issuer": ISSUER, "authorization_endpoint": "https://login.example/auth?tenant=7",
           "token_endpoint": "https://login.example/token", "jwks_uri": "https://keys.example/jwks",
           "scopes_supported": ["openid", "email"], "unknown": {"a": [1]}})
}

#[test]
fn a_provider_is_who_it_was_configured_to_be() {
    let issuer = IssuerUrl::parse(ISSUER, Plaintext::Never).unwrap();
    assert_eq!(issuer.discovery_url(), "https://login.example/tenant/.well-known/openid-configuration");
    let read = |document: Value| Discovery::parse(document.to_string().as_bytes(), &issuer);
    let found = read(document()).unwrap();
    assert_eq!((found.jwks_uri.as_str(), found.scopes.len()), ("https://keys.example/jwks", 2));
    for (key, value) in [
        ("issuer", json!("https://evil.example")),
        ("issuer", json!(null)),
        ("jwks_uri", json!("http://keys.example/jwks")),
        ("jwks_uri", json!("http://127.0.0.1/jwks")),
        ("jwks_uri", json!("file:///etc/passwd")),
        ("token_endpoint", json!("https://user:pw@login.example/token")),
        ("token_endpoint", json!(null)),
        ("token_endpoint", json!(["https://login.example/token"])),
        ("authorization_endpoint", json!("https://login.example/#x")),
        ("userinfo_endpoint", json!("javascript:alert(1)")),
    ] {
        let mut bad = document();
        bad[key] = value.clone();
        assert!(read(bad).is_err(), "{key}: {value}");
    }
    assert!(Discovery::parse(&vec![b' '; MAX_DISCOVERY + 1], &issuer).is_err());

    for bad in [
        "",
        "login.example",
        "http://login.example",
        "http://localhost:3000",
        "https://a/?b",
        "https://a/#b",
        "https://u@a/",
    ] {
        assert!(IssuerUrl::parse(bad, Plaintext::Never).is_err(), "{bad}");
    }
    for good in ["http://localhost:3000", "http://127.0.0.1:3000/x", "http://[::1]:3000", "https://login.example"] {
        assert!(IssuerUrl::parse(good, Plaintext::Loopback).is_ok(), "{good}");
    }
    for bad in ["http://login.example", "http://localhost.evil.example", "http://10.0.0.1"] {
        assert!(IssuerUrl::parse(bad, Plaintext::Loopback).is_err(), "{bad}");
    }
}

#[test]
fn the_browser_is_sent_with_a_challenge() {
    // RFC 7636, appendix B.
    let pkce = Pkce::from_verifier("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk").unwrap();
    assert_eq!(pkce.challenge(), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
    for bad in ["", &"a".repeat(42), &"a".repeat(129), &"ä".repeat(30), &" ".repeat(50)] {
        assert_eq!(pkce_challenge(bad), Err(FederationError::Verifier));
    }
    let (one, two) = (Pkce::generate(), Pkce::generate());
    assert_eq!(pkce_challenge(one.verifier()).unwrap(), one.challenge());
    assert_ne!(one.verifier(), two.verifier());
    assert!(!format!("{one:?}").contains(one.verifier()));
    assert_ne!(random_state(), random_state());

    let issuer = IssuerUrl::parse(ISSUER, Plaintext::Never).unwrap();
    let provider = Discovery::parse(document().to_string().as_bytes(), &issuer).unwrap();
    let url =
        authorization_url(&provider, "nexus", "https://cloud.example/cb?a=b", &["openid", "email"], "s&1", "n", &pkce);
    assert_eq!(
        url.unwrap(),
        "https://login.example/auth?tenant=7&response_type=code&client_id=nexus\
         &redirect_uri=https%3A%2F%2Fcloud.example%2Fcb%3Fa%3Db&scope=openid+email&state=s%261&nonce=n\
         &code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM&code_challenge_method=S256"
    );
    let form = code_form("nexus", "https://cloud.example/cb", "c=1", &pkce);
    assert!(
        form.contains("code=c%3D1&code_verifier=dBjftJeZ4CVP") && form.starts_with("grant_type=authorization_code&")
    );
    let answer = TokenAnswer::parse(br#"{"access_token": "a", "id_token": "i", "token_type": "Bearer"}"#).unwrap();
    assert_eq!((answer.access_token.as_str(), answer.id_token.as_str()), ("a", "i"));
    assert_eq!(format!("{answer:?}"), "TokenAnswer(…)");
    let refused = TokenAnswer::parse(br#"{"error": "invalid_grant", "error_description": "too\nlate"}"#).unwrap_err();
    assert_eq!(refused.to_string(), "the provider refused: invalid_grant (toolate)");
    for bad in ["", "{}", r#"{"access_token": "a"}"#, r#"{"access_token": 1, "id_token": "i"}"#] {
        assert!(matches!(TokenAnswer::parse(bad.as_bytes()), Err(FederationError::Unreadable { .. })));
    }
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn only_groups_of_the_table_are_given() {
    let table = [("dev", vec!["developers"]), ("ops", vec!["operators", "developers"])];
    let table = table.map(|(k, v)| (k.to_owned(), v.into_iter().map(str::to_owned).collect())).into();
    let mapping = |claim: &str| GroupMapping { claim: claim.into(), table };
    let groups = mapping("groups");
    let of = |value: Value| groups.groups(&map(json!({"groups": value})));
    assert_eq!(of(json!(["ops", "dev", "admins", "operators"])).unwrap(), ["developers", "operators"]);
    assert_eq!(of(json!("dev")).unwrap(), ["developers"]);
    assert_eq!(of(json!("dev ops")).unwrap(), [""; 0]);
    assert_eq!(of(json!(null)).unwrap(), [""; 0]);
    assert_eq!(groups.groups(&Map::new()).unwrap(), [""; 0]);
    for bad in [
        json!(7),
        json!({"dev": true}),
        json!(["dev", 7]),
        json!(["x".repeat(257)]),
        json!(vec!["dev"; MAX_GROUPS + 1]),
    ] {
        assert!(matches!(of(bad), Err(FederationError::Groups { .. })));
    }
    let elsewhere = map(json!({"_claim_names": {"groups": "src1"}, "_claim_sources": {}}));
    assert_eq!(groups.groups(&elsewhere), Err(FederationError::GroupsElsewhere));

    let nested = GroupMapping { claim: "/realm_access/a~1b".into(), ..groups.clone() };
    let claims = map(json!({"realm_access": {"a/b": ["dev"]}, "https://x/groups": ["ops"]}));
    assert_eq!(nested.groups(&claims).unwrap(), ["developers"]);
    let named = GroupMapping { claim: "https://x/groups".into(), ..groups };
    assert_eq!(named.groups(&claims).unwrap().len(), 2);
}

#[test]
fn every_claim_that_is_asked_for_must_hold() {
    let claims = map(json!({"repository": "acme/shop", "ref": "refs/heads/main", "n": 7, "verified": true,
                            "aud": ["a", "b"], "job": {"env": "prod"}, "empty": [], "null": null}));
    let holds = |wanted: &[(&str, &str)]| {
        let wanted = wanted.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        require_claims(&claims, &wanted)
    };
    let good = [("repository", "acme/shop"), ("n", "7"), ("verified", "true"), ("aud", "b"), ("/job/env", "prod")];
    assert_eq!(holds(&good), Ok(()));
    for (claim, value) in [
        ("repository", "acme/shop2"),
        ("repository", "acme"),
        ("ref", ""),
        ("absent", "x"),
        ("empty", ""),
        ("null", "null"),
        ("job", "prod"),
        ("aud", "a,b"),
        ("/job/none", "prod"),
    ] {
        let unmet = Err(FederationError::Unmet { claim: claim.to_owned() });
        assert_eq!(holds(&[("n", "7"), (claim, value)]), unmet, "{claim}: {value}");
    }
}

#[test]
fn a_person_is_issuer_and_subject_together() {
    let key = |issuer: &str, subject: &str| Subject { issuer: issuer.into(), subject: subject.into() }.key();
    assert_eq!(key("https://a", "1"), key("https://a", "1"));
    assert_ne!(key("https://a", "1"), key("https://b", "1"));
    assert_ne!(key("https://a", "b1"), key("https://ab", "1"));
    assert_eq!(key("https://a", "1").len(), 64);
}

fn form(pairs: &[(&str, &str)]) -> Result<ExchangeRequest, OAuthError> {
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
    ExchangeRequest::from_form(body.as_bytes())
}

const ID_TOKEN: &str = "urn:ietf:params:oauth:token-type:id_token";

#[test]
fn an_exchange_is_read_as_the_rfc_has_it() {
    let asked = form(&[
        ("grant_type", GRANT_TOKEN_EXCHANGE),
        ("subject_token", "t.o.k"),
        ("subject_token_type", ID_TOKEN),
        ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
        ("audience", "a"),
        ("audience", "b"),
        ("scope", "read  write"),
        ("actor_token", ""),
        ("organization", "acme"),
    ])
    .unwrap();
    assert_eq!((asked.subject_token.as_str(), asked.subject_token_type), ("t.o.k", TokenType::IdToken));
    assert_eq!((asked.requested_token_type, asked.actor.is_none()), (Some(TokenType::AccessToken), true));
    assert_eq!((asked.audience.len(), asked.scope.len()), (2, 2));
    assert_eq!(asked.others, [("organization".to_owned(), "acme".to_owned())]);
    assert!(!format!("{asked:?}").contains("t.o.k"));
}

#[test]
fn a_bad_exchange_gets_the_code_of_the_rfc() {
    use OAuthErrorCode as Code;
    let base = [("grant_type", GRANT_TOKEN_EXCHANGE), ("subject_token", "t"), ("subject_token_type", ID_TOKEN)];
    let with = |more: &[(&str, &str)]| form(&[&base, more].concat()).map(|_| ()).map_err(|e| e.code);
    assert_eq!(with(&[]), Ok(()));
    for more in [
        ("subject_token", "u"),
        ("scope", "a"),
        ("actor_token", "x"),
        ("actor_token_type", ID_TOKEN),
        ("requested_token_type", "urn:ietf:params:oauth:token-type:saml2"),
    ] {
        let repeated = if more.0 == "scope" { vec![more, more] } else { vec![more] };
        assert_eq!(with(&repeated), Err(Code::InvalidRequest), "{}", more.0);
    }
    assert_eq!(with(&[("audience", "a"); 11]), Err(Code::InvalidTarget));
    assert_eq!(with(&[("scope", &"a ".repeat(51))]), Err(Code::InvalidScope));
    for missing in 0..3 {
        let mut pairs = base.to_vec();
        pairs.remove(missing);
        assert_eq!(form(&pairs).unwrap_err().code, Code::InvalidRequest);
    }
    assert_eq!(form(&[("grant_type", "password")]).unwrap_err().code, Code::UnsupportedGrantType);
    assert!(ExchangeRequest::from_form(&vec![b'a'; 200_000]).is_err());
    assert!(ExchangeRequest::from_form("a=1&".repeat(100).as_bytes()).is_err());
    let error = OAuthError::new(Code::InvalidClient, "who is \"Zoë\"?\n");
    assert_eq!(error.status(), 401);
    assert_eq!(
        serde_json::to_value(&error).unwrap(),
        json!({"error": "invalid_client", "error_description": "who is 'Zo''?'"})
    );
}
