//! A fleet's vocabulary for the tests of policies: what is served today, and with the identity kinds.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, OnceLock};

use nexus_iam::policy::{Circumstances, EXTRAS, OPERATIONS, Surface, VERBS, Vocabulary};
use nexus_model::Timestamp;
use nexus_model::kind::{self, Home, KindDescriptor, Scope, Verbs};
use nexus_model::selector::Labels;

/// A kind of no content.
pub fn kind(kind: &'static str, plural: &'static str, scope: Scope) -> KindDescriptor {
    let like = kind::find("event").unwrap();
    KindDescriptor {
        kind,
        plural,
        short: &[],
        about: "",
        scope,
        home: Home::Global,
        verbs: Verbs::ALL,
        columns: &[],
        immutable: &[],
        parse_spec: like.parse_spec,
        spec_schema: like.spec_schema,
        status_schema: like.status_schema,
        example: like.example,
    }
}

fn copy(d: &KindDescriptor) -> KindDescriptor {
    KindDescriptor { verbs: d.verbs, home: d.home, ..kind(d.kind, d.plural, d.scope) }
}

/// What is served today.
pub fn today() -> Arc<Vocabulary> {
    nexus_iam::policy::vocabulary().clone()
}

/// With every kind that the rules speak of.
pub fn everything() -> Arc<Vocabulary> {
    static MADE: OnceLock<Arc<Vocabulary>> = OnceLock::new();
    let make = || {
        let identity = [
            ("User", "users", Scope::Global),
            ("Group", "groups", Scope::Global),
            ("ServiceAccount", "service-accounts", Scope::Global),
            ("RoleBinding", "role-bindings", Scope::Global),
            ("Policy", "policies", Scope::Global),
            ("IdentityProvider", "identity-providers", Scope::Global),
            ("Token", "tokens", Scope::Global),
            ("AccessKey", "access-keys", Scope::Global),
            ("Session", "sessions", Scope::Global),
            ("Secret", "secrets", Scope::Project),
        ];
        let mut kinds: Vec<KindDescriptor> = kind::all().iter().map(copy).collect();
        for (name, plural, scope) in identity {
            if !kinds.iter().any(|k| k.plural == plural) {
                kinds.push(kind(name, plural, scope));
            }
        }
        let surface = Surface { kinds: kinds.leak(), verbs: VERBS, operations: OPERATIONS, extras: EXTRAS };
        Arc::new(Vocabulary::new(surface).unwrap())
    };
    MADE.get_or_init(make).clone()
}

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A usual request: 2026, from 10.0.0.1, with no second factor.
pub fn circumstances() -> Circumstances<'static> {
    Circumstances {
        ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
        time: Timestamp::from_millis(1_790_000_000_000),
        mfa: false,
        request_id: "r-1",
    }
}
