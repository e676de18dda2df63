//! Manifests: files of objects in YAML or JSON, several in one file, checked as far as that goes without the cloud.
//!
//! Every fault is named by its file, the number of its document and its field, and all are told at once, before anything
//! is sent.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use nexus_model::kind::KindDescriptor;
use nexus_model::{API_VERSION, Name};
use serde::Deserialize as _;
use serde_json::{Map, Value};

use crate::exit::{Exit, Fail};

/// Bounds one file, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// One object of a manifest.
#[derive(Clone)]
pub struct Manifest {
    /// `web.yaml, document 2`.
    pub place: String,
    pub kind: &'static KindDescriptor,
    pub name: Name,
    /// As the manifest says; the command's project without it.
    pub project: Option<Name>,
    /// As the manifest says; the command's organization without it.
    pub organization: Option<Name>,
    /// As the manifest says; the command's region without it.
    pub region: Option<Name>,
    pub object: Value,
}

/// Reads every file (`-` is standard input; a folder, its `.yaml`, `.yml` and `.json` files), in the order in which the
/// objects need each other.
pub fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Manifest>> {
    let mut manifests = Vec::new();
    let mut faults = Vec::new();
    for path in paths {
        for file in files(path)? {
            let (shown, text) = content(&file)?;
            documents(&shown, &text, &mut manifests, &mut faults);
        }
    }
    if !faults.is_empty() {
        let count = faults.len();
        let noun = if count == 1 { "the manifest is" } else { "the manifests are" };
        return Err(Fail::new(Exit::Failed, format!("{noun} not valid:\n  {}", faults.join("\n  "))).into());
    }
    if manifests.is_empty() {
        return Err(Fail::usage("the files hold no object").into());
    }
    sort(&mut manifests);
    Ok(manifests)
}

/// What is named by others comes first: the kinds are declared in that order.
fn sort(manifests: &mut [Manifest]) {
    manifests.sort_by_key(|m| nexus_model::kind::all().iter().position(|d| d.plural == m.kind.plural));
}

fn files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let failed = |e: std::io::Error| Fail::new(Exit::Failed, format!("reading the folder {}: {e}", path.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let manifest = file.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if manifest && file.is_file() {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Fail::not_found(format!("{} holds no .yaml, .yml or .json file", path.display())).into());
    }
    Ok(found)
}

fn content(path: &Path) -> anyhow::Result<(String, String)> {
    let shown = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|f| f.take(MAX_FILE + 1).read_to_string(&mut text))
    };
    match read {
        Ok(n) if n as u64 > MAX_FILE => {
            Err(Fail::new(Exit::Failed, format!("{shown} is longer than {MAX_FILE} bytes")).into())
        }
        Ok(_) => Ok((shown, text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Fail::not_found(format!("{shown} does not exist")).into())
        }
        Err(e) => Err(Fail::new(Exit::Failed, format!("reading {shown}: {e}")).into()),
    }
}

/// Takes a file's text apart. JSON is YAML too, except that several JSON documents need `---` between them.
fn documents(file: &str, text: &str, out: &mut Vec<Manifest>, faults: &mut Vec<String>) {
    for (i, document) in serde_norway::Deserializer::from_str(text).enumerate() {
        let place = format!("{file}, document {}", i + 1);
        match Value::deserialize(document) {
            // A separator with nothing behind it.
            Ok(Value::Null) => {}
            Ok(value) => object(&place, value, out, faults),
            Err(e) => {
                faults.push(format!("{place}: {e}"));
                // Where the next document begins can't be known.
                return;
            }
        }
    }
}

fn object(place: &str, mut value: Value, out: &mut Vec<Manifest>, faults: &mut Vec<String>) {
    let mut fault = |field: &str, message: &str| {
        let at = if field.is_empty() { String::new() } else { format!("{field}: ") };
        faults.push(format!("{place}: {at}{message}"));
    };
    let Some(map) = value.as_object_mut() else {
        return fault("", "an object with apiVersion, kind, metadata and spec is expected");
    };
    match map.get("apiVersion") {
        None => {
            map.insert("apiVersion".into(), API_VERSION.into());
        }
        Some(version) if version == API_VERSION => {}
        Some(_) => return fault("apiVersion", &format!("must be {API_VERSION:?}")),
    }
    let Some(word) = map.get("kind").and_then(Value::as_str).map(str::to_owned) else {
        return fault("kind", "is required, such as App");
    };
    // What `get -o yaml` gave for several.
    if let Some(items) = word.ends_with("List").then(|| map.get_mut("items")).flatten() {
        let Value::Array(items) = items.take() else { return fault("items", "a list of objects is expected") };
        for (i, item) in items.into_iter().enumerate() {
            object(&format!("{place}, item {}", i + 1), item, out, faults);
        }
        return;
    }
    let kind = match super::resource::find_kind(&word) {
        Ok(kind) => kind,
        Err(e) => return fault("kind", &e.message),
    };
    map.insert("kind".into(), kind.kind.into());
    let Some(metadata) = map.get_mut("metadata").and_then(Value::as_object_mut) else {
        return fault("metadata.name", "is required");
    };
    // A manifest says what shall be, whatever is now. Only `apply` itself compares revisions.
    metadata.shift_remove("revision");
    let Some(name) = metadata.get("name").and_then(Value::as_str) else {
        return fault("metadata.name", "is required");
    };
    let name = match name.parse::<Name>() {
        Ok(name) => name,
        Err(e) => return fault("metadata.name", &e.to_string()),
    };
    let project = match metadata.get("project").map(|p| p.as_str().unwrap_or_default().parse::<Name>()) {
        None => None,
        Some(Ok(project)) => Some(project),
        Some(Err(e)) => return fault("metadata.project", &e.to_string()),
    };
    let organization = match metadata.get("organization").map(|o| o.as_str().unwrap_or_default().parse::<Name>()) {
        None => None,
        Some(Ok(organization)) => Some(organization),
        Some(Err(e)) => return fault("metadata.organization", &e.to_string()),
    };
    let region = match metadata.get("region").map(|r| r.as_str().unwrap_or_default().parse::<Name>()) {
        None => None,
        Some(Ok(region)) => Some(region),
        Some(Err(e)) => return fault("metadata.region", &e.to_string()),
    };
    map.shift_remove("status");
    match map.get("spec") {
        None => return fault("spec", "is required"),
        Some(spec) => {
            if let Err(errors) = (kind.parse_spec)(spec) {
                errors.iter().for_each(|e| fault(&e.field, &e.message));
                return;
            }
        }
    }
    out.push(Manifest { place: place.to_owned(), kind, name, project, organization, region, object: value });
}

/// What a user may say of an object: what `apply` compares and shows.
pub fn users_part(object: &Value) -> Value {
    let mut metadata = Map::new();
    for key in ["name", "project", "organization", "labels", "annotations", "deletionProtection"] {
        let value = &object["metadata"][key];
        if !value.is_null() && value != &Value::Bool(false) {
            metadata.insert(key.into(), value.clone());
        }
    }
    let mut part = Map::new();
    for key in ["apiVersion", "kind"] {
        part.insert(key.into(), object[key].clone());
    }
    part.insert("metadata".into(), metadata.into());
    part.insert("spec".into(), object["spec"].clone());
    part.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> (Vec<Manifest>, Vec<String>) {
        let (mut manifests, mut faults) = (Vec::new(), Vec::new());
        documents("web.yaml", text, &mut manifests, &mut faults);
        (manifests, faults)
    }

    const PAIR: &str = "---\nkind: Route\nmetadata: {name: shop}\nspec: {host: shop.example.com, app: web}\n---\n\
                        apiVersion: cloudnexus/v1\nkind: app\nmetadata:\n  name: web\n  project: p\n  revision: 4\n\
                        spec:\n  image: web\n  replicas: 2\nstatus: {phase: Ready}\n---\n";

    #[test]
    fn documents_are_split_and_put_in_the_order_of_need() {
        let (mut manifests, faults) = split(PAIR);
        assert!(faults.is_empty(), "{faults:?}");
        sort(&mut manifests);
        let got: Vec<_> = manifests.iter().map(|m| (m.kind.kind, m.name.as_str(), m.place.as_str())).collect();
        assert_eq!(got, [("App", "web", "web.yaml, document 2"), ("Route", "shop", "web.yaml, document 1")]);
        let app = &manifests[0];
        assert_eq!(app.project.as_ref().unwrap(), &"p");
        assert_eq!(app.object["kind"], "App");
        assert!(app.object["metadata"].get("revision").is_none() && app.object.get("status").is_none());
    }

    #[test]
    fn json_and_lists_are_manifests_too() {
        let list = r#"{"apiVersion": "cloudnexus/v1", "kind": "AppList", "items": [
            {"kind": "App", "metadata": {"name": "a"}, "spec": {"image": "x"}},
            {"kind": "App", "metadata": {"name": "b"}, "spec": {"image": "x"}}]}"#;
        let (manifests, faults) = split(list);
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(manifests.len(), 2);
        assert_eq!(manifests[1].place, "web.yaml, document 1, item 2");
    }

    #[test]
    fn a_fault_is_named_by_file_document_and_field() {
        let text = "kind: App\nmetadata: {name: a}\nspec: {image: x, ports: [{port: 0}], replcas: 2}\n---\n\
                    kind: Ap\n---\nkind: App\nmetadata: {name: A}\n---\n- 1\n---\nkind: [\n";
        let (_, faults) = split(text);
        assert_eq!(faults[0], "web.yaml, document 1: spec.replcas: there is no such field");
        assert_eq!(faults[1], "web.yaml, document 1: spec.ports[0].port: between 1 and 65535");
        assert!(
            faults[2].starts_with("web.yaml, document 2: kind: ") && faults[2].contains("did you mean"),
            "{}",
            faults[2]
        );
        assert!(faults[3].starts_with("web.yaml, document 3: metadata.name: "));
        assert!(faults[4].starts_with("web.yaml, document 4: an object"));
        assert!(faults[5].starts_with("web.yaml, document 5: ") && faults[5].contains("line"), "{}", faults[5]);
        assert_eq!(faults.len(), 6);
    }

    #[test]
    fn a_folder_gives_its_manifests_sorted_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.json", "readme.md", "c.yml"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let names: Vec<_> = files(dir.path()).unwrap();
        let names: Vec<_> = names.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.json", "b.yaml", "c.yml"]);
    }
}
