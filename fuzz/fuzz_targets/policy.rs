//! Custom policies, checked as when one is written. A policy that the check lets through, the engine takes.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use nexus_iam::policy::{Change, Engine, PolicyText, Reach, Surface, Vocabulary, check};
use nexus_model::kind;

static VOCABULARY: LazyLock<Arc<Vocabulary>> = LazyLock::new(|| {
    let surface = Surface { kinds: kind::all(), verbs: &[], operations: &[], extras: &[] };
    Arc::new(Vocabulary::new(surface).expect("the kinds have rules"))
});

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    let reach = if choice & 1 == 0 { Reach::organization("acme") } else { Reach::project("acme", "shop") };
    let policy = PolicyText { name: "p".into(), reach, guard_rail: choice & 2 != 0, text: text.into() };
    if check(&VOCABULARY, &policy).is_ok() {
        let mut engine = Engine::new(VOCABULARY.clone()).expect("the built-in policies are right");
        if let Err(e) = engine.apply(Change::Policy(policy)) {
            panic!("checked and refused: {e}");
        }
    }
});
