//! A kind is declared once: here. Routes, schemas, command-line verbs and table columns are derived from its
//! [`KindDescriptor`] by generic code.
//!
//! To add a kind: write its file with `Spec` and `Status`, implement [`Kind`], and list it in [`all`]. Who may do what with
//! it is decided in the policy room's table of rules.

mod app;
mod autoscale;
mod constraint;
mod cron;
mod disruption;
mod event;
mod federation;
mod fleet;
mod identity;
mod image;
mod instance;
mod job;
mod network;
mod numa;
mod part;
mod rollout;
mod route;
mod secret;
mod tenancy;
mod webhook;

use std::fmt::Debug;

pub use app::*;
pub use autoscale::*;
pub use constraint::*;
pub use cron::*;
pub use disruption::*;
pub use event::*;
pub use federation::*;
pub use fleet::*;
pub use identity::*;
pub use image::*;
pub use instance::*;
pub use job::*;
pub use network::*;
pub use numa::*;
pub use part::*;
pub use rollout::*;
pub use route::*;
use schemars::{JsonSchema, Schema, SchemaGenerator};
pub use secret::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
pub use tenancy::*;
pub use webhook::*;

use crate::FieldError;
use crate::selector::{Labels, is_label_key, is_label_value};

/// Where an object's name is unique, and so where its path hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// `/v1/{plural}`: one name for the whole fleet.
    Global,
    /// `/v1/regions/{region}/{plural}`: the machines of a region.
    Region,
    /// `/v1/regions/{region}/projects/{project}/{plural}`: what a project owns.
    Project,
    /// `/v1/organizations/{organization}/{plural}`: what an organization owns beside its projects.
    Organization,
}

/// Which group of the metadata store keeps a kind's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// The fleet's one group, `global`: answered alike in every region.
    Global,
    /// The group of the region that the object is in.
    Region,
    /// The path says which: its region is `global` or a region's name.
    Either,
}

/// What users may do to a kind. Reading is always allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verbs {
    pub create: bool,
    pub update: bool,
    pub delete: bool,
}

impl Verbs {
    pub const ALL: Self = Self { create: true, update: true, delete: true };
    /// Made and kept by the cloud itself.
    pub const READ_ONLY: Self = Self { create: false, update: false, delete: false };
}

/// How a column's value is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    Plain,
    /// A timestamp as an age.
    Age,
    /// The length of an array or object.
    Count,
    /// Milliseconds as a duration.
    Millis,
    /// Microseconds as a duration.
    Micros,
    /// A number, with the one at this pointer of which it is a part.
    Of(&'static str),
}

/// One column of a table. `pointer` is a JSON pointer (RFC 6901) into the object.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub title: &'static str,
    pub pointer: &'static str,
    pub show: Show,
    /// Only with `-o wide`.
    pub wide: bool,
}

impl Column {
    pub const fn new(title: &'static str, pointer: &'static str) -> Self {
        Self { title, pointer, show: Show::Plain, wide: false }
    }

    pub const fn age(title: &'static str, pointer: &'static str) -> Self {
        Self { title, pointer, show: Show::Age, wide: false }
    }

    pub const fn count(title: &'static str, pointer: &'static str) -> Self {
        Self { title, pointer, show: Show::Count, wide: false }
    }

    pub const fn millis(title: &'static str, pointer: &'static str) -> Self {
        Self { title, pointer, show: Show::Millis, wide: false }
    }

    pub const fn micros(title: &'static str, pointer: &'static str) -> Self {
        Self { title, pointer, show: Show::Micros, wide: false }
    }

    pub const fn of(title: &'static str, pointer: &'static str, whole: &'static str) -> Self {
        Self { title, pointer, show: Show::Of(whole), wide: false }
    }

    pub const fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

/// A type of resource.
pub trait Kind: Debug + Clone + Send + Sync + 'static {
    const KIND: &'static str;
    const PLURAL: &'static str;
    const SHORT: &'static [&'static str];
    /// One sentence, for `explain` and the API's documentation.
    const ABOUT: &'static str;
    const SCOPE: Scope;
    const HOME: Home;
    const VERBS: Verbs;
    /// Beside NAME and AGE, which every table has.
    const COLUMNS: &'static [Column];

    type Spec: Debug + Clone + PartialEq + Default + Serialize + DeserializeOwned + JsonSchema + Send + Sync;
    type Status: Debug + Clone + PartialEq + Default + Serialize + DeserializeOwned + JsonSchema + Send + Sync;

    /// The rules that the type can't carry. Fields are named from `spec`.
    fn validate(spec: &Self::Spec) -> Vec<FieldError>;

    /// Which parts of a spec may never change after the create, by their names in `spec`.
    const IMMUTABLE: &'static [&'static str] = &[];

    /// A spec that a reader can start from.
    fn example() -> Self::Spec;
}

/// At most 64 labels (or annotations), with well-formed keys and values.
pub fn validate_labels(field: &str, labels: &Labels) -> Vec<FieldError> {
    if labels.len() > 64 {
        return vec![FieldError::new(field, "at most 64")];
    }
    let wrong = labels.iter().filter(|(k, v)| !is_label_key(k) || !is_label_value(v));
    wrong
        .map(|(k, _)| {
            let key: String = k.chars().take(80).collect();
            FieldError::new(format!("{field}.{key}"), "at most 63 letters, digits, '-', '_' and '.' in key and value")
        })
        .collect()
}

/// The longest value of an annotation, in characters.
pub const MAX_ANNOTATION: usize = 4096;

/// At most 64 annotations, with keys like labels' and values of at most [`MAX_ANNOTATION`] characters.
pub fn validate_annotations(field: &str, annotations: &Labels) -> Vec<FieldError> {
    if annotations.len() > 64 {
        return vec![FieldError::new(field, "at most 64")];
    }
    let mut errors = Vec::new();
    for (key, value) in annotations {
        let at = || format!("{field}.{}", key.chars().take(80).collect::<String>());
        if !is_label_key(key) {
            let message = "at most 63 letters, digits, '-', '_' and '.' in a key, after an optional prefix/";
            errors.push(FieldError::new(at(), message));
        }
        if value.chars().count() > MAX_ANNOTATION {
            errors.push(FieldError::new(at(), format!("at most {MAX_ANNOTATION} characters")));
        }
    }
    errors
}

/// A kind as generic code sees it.
pub struct KindDescriptor {
    pub kind: &'static str,
    pub plural: &'static str,
    pub short: &'static [&'static str],
    pub about: &'static str,
    pub scope: Scope,
    pub home: Home,
    pub verbs: Verbs,
    pub columns: &'static [Column],
    pub immutable: &'static [&'static str],
    /// Reads a spec strictly (an unknown field is an error), checks its rules, and returns it whole, with defaults.
    pub parse_spec: fn(&Value) -> Result<Value, Vec<FieldError>>,
    pub spec_schema: fn(&mut SchemaGenerator) -> Schema,
    pub status_schema: fn(&mut SchemaGenerator) -> Schema,
    pub example: fn() -> Value,
}

fn parse_spec<K: Kind>(value: &Value) -> Result<Value, Vec<FieldError>> {
    // What serde says of a wrong type shows the value, which may be a secret.
    if !value.is_object() && !value.is_null() {
        return Err(vec![FieldError::new("spec", "must be an object")]);
    }
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let spec: K::Spec = {
        let with_path = serde_path_to_error::Deserializer::new(value, &mut track);
        match serde_ignored::deserialize(with_path, |path| unknown.push(path.to_string())) {
            Ok(spec) => spec,
            Err(e) => {
                let path = track.path().to_string();
                let field = if path == "." { "spec".to_owned() } else { format!("spec.{path}") };
                return Err(vec![FieldError::new(field, e.to_string())]);
            }
        }
    };
    let mut errors: Vec<_> = unknown
        .into_iter()
        .map(|path| FieldError::new(format!("spec.{}", path.replace(".?", "")), "there is no such field"))
        .collect();
    errors.extend(K::validate(&spec));
    let whole = serde_json::to_value(&spec).expect("specs are plain data");
    lists_for_objects("spec", value, &whole, &mut errors);
    if errors.is_empty() { Ok(whole) } else { Err(errors) }
}

/// Finds lists where an object belongs: serde would take a struct's fields from a list too, in their order.
fn lists_for_objects(at: &str, given: &Value, read: &Value, errors: &mut Vec<FieldError>) {
    match (given, read) {
        (Value::Array(_), Value::Object(_)) => errors.push(FieldError::new(at, "must be an object, not a list")),
        (Value::Array(given), Value::Array(read)) => {
            for (i, (given, read)) in given.iter().zip(read).enumerate() {
                lists_for_objects(&format!("{at}[{i}]"), given, read, errors);
            }
        }
        (Value::Object(given), Value::Object(read)) => {
            for (key, read) in read {
                if let Some(given) = given.get(key) {
                    lists_for_objects(&format!("{at}.{key}"), given, read, errors);
                }
            }
        }
        _ => {}
    }
}

impl KindDescriptor {
    pub const fn of<K: Kind>() -> Self {
        Self {
            kind: K::KIND,
            plural: K::PLURAL,
            short: K::SHORT,
            about: K::ABOUT,
            scope: K::SCOPE,
            home: K::HOME,
            verbs: K::VERBS,
            columns: K::COLUMNS,
            immutable: K::IMMUTABLE,
            parse_spec: parse_spec::<K>,
            spec_schema: |g| g.subschema_for::<K::Spec>(),
            status_schema: |g| g.subschema_for::<K::Status>(),
            example: || serde_json::to_value(K::example()).expect("specs are plain data"),
        }
    }

    /// Whether `word` names this kind: the kind, its plural or a short form, in any case.
    pub fn answers_to(&self, word: &str) -> bool {
        let word = word.to_ascii_lowercase();
        self.kind.to_ascii_lowercase() == word || self.plural == word || self.short.contains(&word.as_str())
    }
}

static ALL: [KindDescriptor; 40] = [
    KindDescriptor::of::<Organization>(),
    KindDescriptor::of::<Project>(),
    KindDescriptor::of::<User>(),
    KindDescriptor::of::<ServiceAccount>(),
    KindDescriptor::of::<Group>(),
    KindDescriptor::of::<RoleBinding>(),
    KindDescriptor::of::<Policy>(),
    KindDescriptor::of::<Token>(),
    KindDescriptor::of::<AccessKey>(),
    KindDescriptor::of::<Session>(),
    KindDescriptor::of::<IdentityProvider>(),
    KindDescriptor::of::<Region>(),
    KindDescriptor::of::<Zone>(),
    KindDescriptor::of::<Cell>(),
    KindDescriptor::of::<Host>(),
    KindDescriptor::of::<Image>(),
    // Before those who name them, so that a folder of manifests is applied in an order that works at once.
    KindDescriptor::of::<Secret>(),
    KindDescriptor::of::<AddressPool>(),
    KindDescriptor::of::<PrefixList>(),
    KindDescriptor::of::<Network>(),
    KindDescriptor::of::<InternetGateway>(),
    KindDescriptor::of::<NatGateway>(),
    KindDescriptor::of::<Peering>(),
    KindDescriptor::of::<RouteTable>(),
    KindDescriptor::of::<Subnet>(),
    KindDescriptor::of::<SecurityGroup>(),
    KindDescriptor::of::<App>(),
    KindDescriptor::of::<AppRevision>(),
    KindDescriptor::of::<Job>(),
    KindDescriptor::of::<CronJob>(),
    KindDescriptor::of::<Instance>(),
    KindDescriptor::of::<Nic>(),
    KindDescriptor::of::<FloatingIp>(),
    KindDescriptor::of::<LoadBalancer>(),
    KindDescriptor::of::<DnsZone>(),
    KindDescriptor::of::<Route>(),
    KindDescriptor::of::<Event>(),
    KindDescriptor::of::<Usage>(),
    KindDescriptor::of::<Webhook>(),
    KindDescriptor::of::<Delivery>(),
];

/// Kinds that only servers read and write: they are stored like all others, and nothing else is made of their declaration.
static PRIVATE: [KindDescriptor; 3] =
    [KindDescriptor::of::<Credential>(), KindDescriptor::of::<SigningKey>(), KindDescriptor::of::<Departure>()];

/// Every kind that users meet, in the order in which a reader meets them.
pub fn all() -> &'static [KindDescriptor] {
    &ALL
}

/// The kind that `word` names: kind, plural or short form.
pub fn find(word: &str) -> Option<&'static KindDescriptor> {
    ALL.iter().find(|d| d.answers_to(word))
}

/// The kind of that very name or plural, private ones among them: for what is stored.
pub fn stored(name: &str) -> Option<&'static KindDescriptor> {
    ALL.iter().chain(&PRIVATE).find(|d| d.plural == name || d.kind == name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_example_is_valid_and_no_word_is_ambiguous() {
        let mut words = std::collections::BTreeSet::new();
        for d in all().iter().chain(&PRIVATE) {
            let example = (d.example)();
            assert_eq!((d.parse_spec)(&example).unwrap_or_else(|e| panic!("{}: {e:?}", d.kind)), example, "{}", d.kind);
            for word in
                [d.kind.to_lowercase(), d.plural.to_owned()].into_iter().chain(d.short.iter().map(|s| (*s).into()))
            {
                assert!(words.insert(word.clone()), "{word} names two kinds");
            }
        }
    }

    #[test]
    fn an_unknown_field_or_wrong_unit_names_its_place() {
        let parse = find("app").unwrap().parse_spec;
        let errors = parse(&json!({"image": "web", "resources": {"memroy": "64Mi"}})).unwrap_err();
        assert_eq!(errors[0].field, "spec.resources.memroy");
        let errors = parse(&json!({"image": "web", "resources": {"memory": "64 megs"}})).unwrap_err();
        assert_eq!(errors[0].field, "spec.resources.memory");
        assert!(errors[0].message.contains("64Mi"), "{}", errors[0].message);
        for list in
            [json!({"health": [null, null]}), json!({"resources": ["1", "64Mi", 9, "1Mi"]}), json!({"ports": [[80]]})]
        {
            let mut spec = json!({"image": "web"});
            spec.as_object_mut().unwrap().extend(list.as_object().unwrap().clone());
            let errors = parse(&spec).unwrap_err();
            assert!(errors[0].field.starts_with("spec."), "{errors:?}");
        }
        let errors = parse(&json!({"image": "web", "ports": [{"port": 0}]})).unwrap_err();
        assert_eq!(errors[0].field, "spec.ports[0].port");
    }
}
