//! Label selectors. A selector that was accepted answers for any labels, and never both `key` and `!key`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nexus_model::selector::{Labels, Selector};

static LABELS: LazyLock<Labels> =
    LazyLock::new(|| [("app", "web"), ("a/b", ""), ("tier", "x.y-z_")].map(|(k, v)| (k.into(), v.into())).into());

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(selector) = text.parse::<Selector>() else { return };
    selector.matches(&LABELS);
    if selector.is_empty() {
        assert!(selector.matches(&LABELS) && selector.matches(&Labels::new()));
    }
    if let (Ok(present), Ok(absent)) = (text.parse::<Selector>(), format!("!{text}").parse::<Selector>())
        && !text.contains([',', '=', '!'])
        && !present.is_empty()
    {
        assert_ne!(present.matches(&LABELS), absent.matches(&LABELS));
    }
});
