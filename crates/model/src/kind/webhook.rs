//! Telling others' servers what happens in a project: where to, and each thing that is to be told.
//!
//! A [`Webhook`] wants the events of a project; a request may bring a callback of its own. Both make [`Delivery`]s, which
//! are stored with the change that they tell of, sent by whichever server leads, and kept until they are taken or given up.
//! What is sent is a CloudEvent (CloudEvents 1.0, JSON format).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Column, EventSpec, Home, Kind, Scope, Verbs};
use crate::secret::{KEY_PATTERN, is_key};
use crate::{Condition, FieldError, Metadata, Name, OwnerRef, Timestamp};

/// Webhooks of a project in one region.
pub const MAX_WEBHOOKS: usize = 20;
/// Kinds and reasons that one names.
const MAX_WORDS: usize = 32;
/// Tries of one delivery at most, and unless the webhook says otherwise.
pub const MAX_ATTEMPTS: u32 = 20;
pub const USUAL_ATTEMPTS: u32 = 14;
/// The key of a secret that signs, unless another is named.
pub const SIGNING_KEY: &str = "key";
/// The longest URL.
pub const MAX_URL: usize = 1024;
/// How a URL to tell things to looks: a host name, an IPv4 address or an IPv6 address in brackets, a port, a path.
pub const URL_PATTERN: &str = concat!(
    r"^https?://([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?){0,20}|\[[0-9a-f:.]{2,45}\])",
    r"(:[1-9][0-9]{0,4})?(/[!$-;=?-Z_a-z~]*)?$",
);
const WORD: &str = "^[A-Z][A-Za-z0-9]{0,63}$";

/// Whether a text is a URL as [`URL_PATTERN`] says, whose port and address are such.
pub fn is_url(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else { return false };
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let path_byte = |b: u8| matches!(b, b'!' | b'$'..=b';' | b'=' | b'?'..=b'Z' | b'_' | b'a'..=b'z' | b'~');
    let is_port =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0') && port.parse::<u16>().is_ok();
    let lower = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b':' | b'.');
    let host_is_good = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').is_some_and(|(address, port)| {
            let port = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
            port && address.bytes().all(lower) && address.parse::<std::net::Ipv6Addr>().is_ok()
        }),
        None => {
            let (host, port) = authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
            let labels = || host.split('.');
            // What ends in a number is an address to whoever connects, and must be one (URL standard, section 3.5).
            let number = labels()
                .next_back()
                .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x"));
            port.is_none_or(is_port)
                && labels().count() <= 21
                && labels().all(|label| label.parse::<Name>().is_ok())
                && (!number || host.parse::<std::net::Ipv4Addr>().is_ok())
        }
    };
    text.len() <= MAX_URL && host_is_good && path.bytes().all(path_byte)
}

fn is_word(text: &str) -> bool {
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// The key of a secret of the project: what is sent is signed with its newest value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SigningSecret {
    /// A secret of the same project: the region's own, else that of the region `global`.
    pub name: Name,
    #[serde(default = "signing_key")]
    #[schemars(regex(pattern = KEY_PATTERN))]
    pub key: String,
}

fn signing_key() -> String {
    SIGNING_KEY.to_owned()
}

impl SigningSecret {
    /// The secret whose key is named as usual.
    pub fn named(name: Name) -> Self {
        Self { name, key: signing_key() }
    }

    /// From `NAME` or `NAME/KEY`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, key) = text.split_once('/').unwrap_or((text, SIGNING_KEY));
        if !is_key(key) {
            return Err("write NAME or NAME/KEY of a secret".to_owned());
        }
        Ok(Self { name: name.parse().map_err(|e| format!("{e}"))?, key: key.to_owned() })
    }
}

impl Default for SigningSecret {
    fn default() -> Self {
        Self::named("none".parse().expect("a well-formed name"))
    }
}

#[derive(Debug, Clone)]
pub struct Webhook;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WebhookSpec {
    /// Where events are POSTed to. Only addresses of the public internet are reached, and those that the operator allows.
    #[schemars(length(max = MAX_URL), regex(pattern = URL_PATTERN))]
    pub url: String,
    /// What signs them.
    pub secret: SigningSecret,
    /// Events about objects of these kinds only, such as `App`; about all without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_WORDS), inner(regex(pattern = WORD)))]
    pub kinds: Vec<String>,
    /// Events with these reasons only, such as `Ready`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_WORDS), inner(regex(pattern = WORD)))]
    pub reasons: Vec<String>,
    /// While this is false nothing new is told, and what waits is given up.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// How often a delivery is tried before it is given up.
    #[serde(default = "usual_attempts")]
    #[schemars(range(min = 1, max = MAX_ATTEMPTS))]
    pub max_attempts: u32,
}

fn yes() -> bool {
    true
}

fn usual_attempts() -> u32 {
    USUAL_ATTEMPTS
}

impl Default for WebhookSpec {
    fn default() -> Self {
        Self {
            url: String::new(),
            secret: SigningSecret::default(),
            kinds: Vec::new(),
            reasons: Vec::new(),
            enabled: true,
            max_attempts: USUAL_ATTEMPTS,
        }
    }
}

impl WebhookSpec {
    /// Whether it wants to hear of an event.
    pub fn wants(&self, event: &EventSpec) -> bool {
        let among = |words: &[String], word: &str| words.is_empty() || words.iter().any(|w| w == word);
        self.enabled && among(&self.kinds, &event.regarding.kind) && among(&self.reasons, &event.reason)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WebhookStatus {
    /// `Delivering`: whether the last try was taken.
    pub conditions: Vec<Condition>,
    /// Deliveries that were dropped because the project had too many.
    pub dropped: u64,
}

impl Kind for Webhook {
    const KIND: &'static str = "Webhook";
    const PLURAL: &'static str = "webhooks";
    const SHORT: &'static [&'static str] = &["hook"];
    const ABOUT: &'static str = "Tells a server of yours what happens in a project, as signed CloudEvents.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("URL", "/spec/url"),
        Column::new("ENABLED", "/spec/enabled"),
        Column::new("DELIVERING", "/status/conditions/0/status"),
        Column::new("DROPPED", "/status/dropped"),
        Column::new("MESSAGE", "/status/conditions/0/message").wide(),
    ];
    type Spec = WebhookSpec;
    type Status = WebhookStatus;

    fn validate(spec: &WebhookSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let mut check = |ok: bool, field: String, message: &str| {
            if !ok {
                errors.push(FieldError::new(field, message));
            }
        };
        check(
            is_url(&spec.url),
            "spec.url".into(),
            "an http:// or https:// URL with a lower-case host, without user or #",
        );
        check(is_key(&spec.secret.key), "spec.secret.key".into(), "names no key of a secret");
        for (field, words) in [("kinds", &spec.kinds), ("reasons", &spec.reasons)] {
            check(words.len() <= MAX_WORDS, format!("spec.{field}"), "at most 32");
            for (i, word) in words.iter().enumerate().take(MAX_WORDS) {
                check(
                    is_word(word),
                    format!("spec.{field}[{i}]"),
                    "one word that begins with a capital, such as App or Ready",
                );
            }
        }
        let attempts = (1..=MAX_ATTEMPTS).contains(&spec.max_attempts);
        check(attempts, "spec.maxAttempts".into(), "between 1 and 20");
        errors
    }

    fn example() -> WebhookSpec {
        WebhookSpec {
            url: "https://hooks.example.com/cloud".into(),
            secret: SigningSecret::named("hooks".parse().expect("a well-formed name")),
            kinds: vec!["App".into()],
            ..WebhookSpec::default()
        }
    }
}

/// One thing that is told to one receiver.
#[derive(Debug, Clone)]
pub struct Delivery;

/// The change whose end a callback waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Awaited {
    /// The plural of the object's kind.
    pub plural: String,
    pub generation: u64,
    /// Its end is that nothing is left of it.
    pub deleted: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeliverySpec {
    /// The webhook that it is for; absent for a request's callback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<Name>,
    /// Of a callback. A webhook's own URL and secret are those that it has when it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SigningSecret>,
    /// The CloudEvent's `type`, as `cloudnexus.v1.App.Ready`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is about. Deliveries of a webhook about one object are sent in order.
    pub regarding: OwnerRef,
    /// The CloudEvent's `subject`, as `apps/web`.
    pub subject: String,
    pub time: Timestamp,
    pub data: Map<String, Value>,
    /// Until that has come about, there is nothing to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaits: Option<Awaited>,
    pub max_attempts: u32,
}

impl Default for DeliverySpec {
    fn default() -> Self {
        let event = EventSpec::default();
        Self {
            webhook: None,
            url: None,
            secret: None,
            kind: String::new(),
            regarding: event.regarding,
            subject: String::new(),
            time: event.last,
            data: Map::new(),
            awaits: None,
            max_attempts: USUAL_ATTEMPTS,
        }
    }
}

impl DeliverySpec {
    /// The `type` of what is told of an object.
    pub fn type_of(kind: &str, reason: &str) -> String {
        format!("cloudnexus.v1.{kind}.{reason}")
    }

    /// The body that is sent: the same for every try, and signed with it.
    pub fn cloud_event(&self, metadata: &Metadata) -> Value {
        let name = |n: &Option<Name>| n.as_ref().map_or_else(String::new, Name::to_string);
        json!({
            "specversion": "1.0",
            "id": metadata.uid,
            "source": format!("/v1/regions/{}/projects/{}", name(&metadata.region), name(&metadata.project)),
            "type": self.kind,
            "subject": self.subject,
            "time": self.time,
            "datacontenttype": "application/json",
            "data": self.data,
        })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeliveryPhase {
    /// What it tells of has not come about.
    #[default]
    Waiting,
    /// It is sent, or will be again.
    Pending,
    Delivered,
    /// Given up: a dead letter, which `:resend` sends again.
    Dead,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DeliveryStatus {
    pub phase: DeliveryPhase,
    /// Since it was last put on its way.
    pub attempts: u32,
    /// When it is sent next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Timestamp>,
    /// When it was last sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<Timestamp>,
    /// What the last try came to.
    pub message: String,
}

impl Kind for Delivery {
    const KIND: &'static str = "Delivery";
    const PLURAL: &'static str = "deliveries";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "One event on its way to one receiver: of a webhook, or of a request's callback.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs { create: false, update: false, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("WEBHOOK", "/spec/webhook"),
        Column::new("TYPE", "/spec/type"),
        Column::new("SUBJECT", "/spec/subject"),
        Column::new("PHASE", "/status/phase"),
        Column::new("ATTEMPTS", "/status/attempts"),
        Column::new("MESSAGE", "/status/message"),
    ];
    type Spec = DeliverySpec;
    type Status = DeliveryStatus;

    fn validate(_: &DeliverySpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> DeliverySpec {
        DeliverySpec {
            webhook: Some("hooks".parse().expect("a well-formed name")),
            kind: DeliverySpec::type_of("App", "Ready"),
            subject: "apps/web".into(),
            ..DeliverySpec::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_host_and_nobody() {
        for good in [
            "https://hooks.example.com",
            "http://127.0.0.1:8080/x?y=1",
            "https://[2001:db8::1]:443/",
            "https://a/%20",
            "http://[::ffff:10.0.0.1]/",
        ] {
            assert!(is_url(good), "{good}");
        }
        let long = format!("https://a/{}", "x".repeat(MAX_URL));
        for bad in [
            "",
            "ftp://a/",
            "https://",
            "https://u:p@a/",
            "https://A/",
            "https://a:0/",
            "https://a:65536/",
            "https://a:/",
            "https://a/#x",
            "https://a/ b",
            "https://1.2.3.4.5/",
            "https://300.1.1.1/",
            "https://0x7f/",
            "https://1/",
            "https://[::1",
            "https://[zz]/",
            "https://a..b/",
            "https://a\\b/",
            &long,
        ] {
            assert!(!is_url(bad), "{bad}");
        }
    }

    #[test]
    fn a_webhook_hears_what_it_asked_for() {
        let mut event = EventSpec { reason: "Ready".into(), ..EventSpec::default() };
        let hook = |kinds: &[&str], reasons: &[&str]| WebhookSpec {
            kinds: kinds.iter().map(|k| (*k).to_owned()).collect(),
            reasons: reasons.iter().map(|r| (*r).to_owned()).collect(),
            ..Webhook::example()
        };
        assert!(hook(&[], &[]).wants(&event) && hook(&["App"], &["Ready", "Deleted"]).wants(&event));
        assert!(!hook(&["Instance"], &[]).wants(&event) && !hook(&[], &["Deleted"]).wants(&event));
        assert!(!WebhookSpec { enabled: false, ..hook(&[], &[]) }.wants(&event));
        event.regarding.kind = "Instance".into();
        assert!(hook(&["Instance"], &["Ready"]).wants(&event));
    }

    #[test]
    fn an_event_has_the_attributes_that_cloudevents_asks_for() {
        let metadata = Metadata {
            region: Some("eu".parse().unwrap()),
            ..Metadata::new("x".parse().unwrap(), Some("shop".parse().unwrap()))
        };
        let event = Delivery::example().cloud_event(&metadata);
        for required in ["specversion", "id", "source", "type"] {
            assert!(event[required].as_str().is_some_and(|t| !t.is_empty()), "{required}");
        }
        assert_eq!(event["source"], "/v1/regions/eu/projects/shop");
    }

    #[test]
    fn a_signing_secret_is_a_name_and_perhaps_a_key() {
        assert_eq!(SigningSecret::parse("hooks").unwrap(), SigningSecret::named("hooks".parse().unwrap()));
        assert_eq!(SigningSecret::parse("hooks/a.b").unwrap().key, "a.b");
        for wrong in ["", "a/", "A", "a/b/c", "a/../b"] {
            assert!(SigningSecret::parse(wrong).is_err(), "{wrong}");
        }
    }
}
