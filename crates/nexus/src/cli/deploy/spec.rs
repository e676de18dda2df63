//! From flags to an app's spec. Pure: what the command line says, laid over what is there.

use indexmap::IndexMap;
use nexus_model::kind::{
    Constraints, Disruption, FUNCTION_PORT, ImageFormat, Port, Protocol, Runtime, SecretRef, Spread, TemplateNetwork,
    TemplateNic,
};
use nexus_model::selector::{is_label_key, is_label_value};
use nexus_model::{API_VERSION, Bytes, MilliCpu, Name};
use serde_json::{Map, Value, json};

/// What a container serves when nobody said.
const USUAL_PORT: u16 = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replicas {
    Count(u32),
    /// As many as the cloud finds right.
    Auto,
}

/// A number, or `auto`.
pub fn replicas(text: &str) -> Result<Replicas, String> {
    if text == "auto" {
        return Ok(Replicas::Auto);
    }
    let count = text.parse().ok().filter(|n| *n <= 10_000);
    count.map(Replicas::Count).ok_or_else(|| "a number up to 10000, or auto".to_owned())
}

/// What the flags ask to be set; what they don't mention stays.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub image: Option<Name>,
    pub runtime: Option<Runtime>,
    pub replicas: Option<Replicas>,
    pub ports: Vec<Port>,
    pub env: Vec<(String, String)>,
    pub labels: Vec<(String, String)>,
    pub secrets: Vec<SecretRef>,
    pub nics: Vec<TemplateNic>,
    pub network: Option<TemplateNetwork>,
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
    pub scratch: Option<Bytes>,
    pub pids: Option<u32>,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub spread: Option<Spread>,
    pub classes: Vec<(Name, u32)>,
    pub storage_class: Option<Name>,
    pub constraints: Option<Constraints>,
    pub health_path: Option<String>,
    pub regions: Vec<Name>,
    /// Fields of `spec.rollout`.
    pub rollout: Map<String, Value>,
    pub disruption: Option<Disruption>,
}

fn value<T: serde::Serialize>(part: &T) -> Value {
    serde_json::to_value(part).expect("parts of specs are plain data")
}

/// The object at `key`, made if there is none.
fn child<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let entry = map.entry(key).or_insert_with(|| json!({}));
    if !entry.is_object() {
        *entry = json!({});
    }
    entry.as_object_mut().expect("made an object above")
}

/// The app to send: `existing` with the flags laid over it, or a new one. `format` is that of its image, if known.
pub fn app(name: &Name, existing: Option<&Value>, wanted: &Wanted, format: Option<ImageFormat>) -> Value {
    let mut object = json!({"apiVersion": API_VERSION, "kind": "App", "metadata": {"name": name}, "spec": {}});
    if let Some(existing) = existing {
        for key in ["labels", "annotations", "deletionProtection"] {
            if let Some(kept) = existing["metadata"].get(key) {
                object["metadata"][key] = kept.clone();
            }
        }
        object["spec"] = existing["spec"].clone();
    }
    let map = object.as_object_mut().expect("made an object above");
    let labels = child(child(map, "metadata"), "labels");
    labels.extend(wanted.labels.iter().map(|(k, v)| (k.clone(), Value::from(v.clone()))));
    let spec = child(map, "spec");

    match (&wanted.image, existing) {
        (Some(image), _) => {
            spec.insert("image".into(), value(image));
            // What an undo has pinned is of the images before.
            spec.shift_remove("imageDigest");
            spec.shift_remove("partDigests");
        }
        (None, None) => drop(spec.insert("image".into(), value(name))),
        (None, Some(_)) => {}
    }
    let by_format = format.map(|f| match f {
        ImageFormat::Oci => Runtime::Container,
        ImageFormat::Wasm => Runtime::Function,
    });
    let before = spec.get("runtime").and_then(|r| serde_json::from_value::<Runtime>(r.clone()).ok());
    let runtime = wanted.runtime.or(by_format).or(before).unwrap_or_default();
    spec.insert("runtime".into(), value(&runtime));
    let turned = before.is_some_and(|b| b != runtime);
    if turned && runtime == Runtime::Function {
        // A function has neither; what the container had is of no use to it.
        for key in ["ports", "command", "args"] {
            spec.shift_remove(key);
        }
    }
    if !wanted.ports.is_empty() {
        spec.insert("ports".into(), value(&wanted.ports));
    } else if runtime == Runtime::Container && (existing.is_none() || turned) {
        spec.insert("ports".into(), json!([{"port": USUAL_PORT, "protocol": "http"}]));
    }
    match wanted.replicas {
        Some(Replicas::Count(replicas)) => {
            spec.insert("replicas".into(), replicas.into());
            spec.shift_remove("autoscale");
        }
        // One that is scaled already goes on as it was set up.
        Some(Replicas::Auto) if spec.get("autoscale").is_some_and(Value::is_object) => {}
        Some(Replicas::Auto) => {
            spec.insert("autoscale".into(), json!({"strategy": "predictive", "minReplicas": 1, "maxReplicas": 10}));
        }
        None => {}
    }
    for (key, list) in [("command", &wanted.command), ("args", &wanted.args)] {
        if !list.is_empty() {
            spec.insert(key.into(), value(list));
        }
    }
    if !wanted.regions.is_empty() {
        spec.insert("regions".into(), value(&wanted.regions));
    }
    if !wanted.rollout.is_empty() {
        let rollout = child(spec, "rollout");
        rollout.extend(wanted.rollout.clone());
        rollout.retain(|_, value| !value.is_null());
    }
    if let Some(disruption) = wanted.disruption {
        spec.insert("disruption".into(), value(&disruption));
    }
    if let Some(spread) = wanted.spread {
        spec.insert("spread".into(), value(&spread));
    }
    if !wanted.env.is_empty() {
        child(spec, "env").extend(wanted.env.iter().map(|(k, v)| (k.clone(), Value::from(v.clone()))));
    }
    if !wanted.secrets.is_empty() {
        let before = spec.get("secrets").and_then(|s| serde_json::from_value(s.clone()).ok()).unwrap_or_default();
        spec.insert("secrets".into(), value(&with_secrets(before, &wanted.secrets)));
    }
    if !wanted.nics.is_empty() {
        spec.insert("nics".into(), value(&wanted.nics));
        spec.shift_remove("network");
    }
    if let Some(network) = &wanted.network {
        spec.insert("network".into(), value(network));
        spec.shift_remove("nics");
    }
    if !wanted.classes.is_empty() {
        let classes: IndexMap<_, _> = wanted.classes.iter().cloned().collect();
        spec.insert("classes".into(), value(&classes));
    }
    if let Some(class) = &wanted.storage_class {
        spec.insert("storageClass".into(), value(class));
    }
    match &wanted.constraints {
        Some(none) if none.is_empty() => drop(spec.shift_remove("constraints")),
        Some(constraints) => drop(spec.insert("constraints".into(), value(constraints))),
        None => {}
    }
    let resources = [
        ("cpu", wanted.cpu.map(|v| value(&v))),
        ("memory", wanted.memory.map(|v| value(&v))),
        ("scratch", wanted.scratch.map(|v| value(&v))),
        ("pids", wanted.pids.map(|v| value(&v))),
    ];
    for (key, amount) in resources {
        if let Some(amount) = amount {
            child(spec, "resources").insert(key.into(), amount);
        }
    }
    if let Some(path) = &wanted.health_path {
        let port = match runtime {
            Runtime::Function => u64::from(FUNCTION_PORT),
            Runtime::Container => spec["ports"][0]["port"].as_u64().unwrap_or(u64::from(USUAL_PORT)),
        };
        let readiness = child(child(spec, "health"), "readiness");
        readiness.insert("probe".into(), json!({"http": {"port": port, "path": path}}));
    }
    let metadata = child(map, "metadata");
    if metadata["labels"].as_object().is_some_and(Map::is_empty) {
        metadata.shift_remove("labels");
    }
    object
}

/// `80`, `80/h2c` or `9000/tcp`.
pub fn port(text: &str) -> Result<Port, String> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "http"));
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let port = number.parse().ok().filter(|p: &u16| digits && *p != 0);
    let port = port.ok_or_else(|| format!("{number:?} is not a port: a number between 1 and 65535"))?;
    let protocol = match protocol {
        "http" => Protocol::Http,
        "h2c" => Protocol::H2c,
        "tcp" => Protocol::Tcp,
        other => return Err(format!("{other:?} is not a protocol: http, h2c or tcp")),
    };
    Ok(Port { port, protocol, name: None })
}

/// `KEY=VALUE`; the value may be empty and may hold more `=`.
pub fn variable(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: write KEY=VALUE"))?;
    if key.is_empty() || key.contains(char::is_whitespace) {
        return Err(format!("{key:?} is not a variable's name"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// What is asked for stands in the place of what set the same variable or folder.
fn with_secrets(mut refs: Vec<SecretRef>, wanted: &[SecretRef]) -> Vec<SecretRef> {
    for new in wanted {
        refs.retain_mut(|old| {
            let variables = old.env.len();
            old.env.retain(|variable, _| !new.env.contains_key(variable));
            let emptied = variables > 0 && old.env.is_empty();
            !emptied && (new.folder().is_none() || old.folder() != new.folder())
        });
        let alike = |r: &&mut SecretRef| r.name == new.name && r.version == new.version && !r.env.is_empty();
        match refs.iter_mut().find(alike).filter(|_| !new.env.is_empty()) {
            Some(old) => old.env.extend(new.env.clone()),
            None => refs.push(new.clone()),
        }
    }
    refs
}

/// A NIC in a subnet, with security groups: `SUBNET[:GROUP,…]`.
pub fn nic(text: &str) -> Result<TemplateNic, String> {
    let (subnet, groups) = text.split_once(':').unwrap_or((text, ""));
    let name = |text: &str| text.parse::<Name>().map_err(|e| format!("{text:?}: {e}"));
    let groups = groups.split(',').filter(|g| !g.is_empty()).map(name).collect::<Result<_, _>>()?;
    Ok(TemplateNic { subnet: name(subnet)?, security_groups: groups, rate: None, forwards: false })
}

/// `VARIABLE=NAME/KEY`, `PATH=NAME` or `NAME`, with `@VERSION` for one that is not the newest.
pub fn secret(text: &str) -> Result<SecretRef, String> {
    let (rest, version) = match text.rsplit_once('@') {
        Some((rest, version)) => {
            let version = version.parse().ok().filter(|v: &u64| *v > 0);
            (rest, Some(version.ok_or("versions are whole numbers from 1")?))
        }
        None => (text, None),
    };
    let name = |text: &str| text.parse::<Name>().map_err(|e| format!("{text:?}: {e}"));
    let (mut env, mut path) = (IndexMap::new(), None);
    let name = match rest.split_once('=') {
        None => name(rest)?,
        Some((at, named)) if at.starts_with('/') => {
            path = Some(at.to_owned());
            name(named)?
        }
        Some((variable, from)) => {
            let (named, key) = from.split_once('/').ok_or("write VARIABLE=NAME/KEY, or /PATH=NAME for files")?;
            env.insert(variable.to_owned(), key.to_owned());
            name(named)?
        }
    };
    Ok(SecretRef { name, version, env, path })
}

pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: write KEY=VALUE"))?;
    if !is_label_key(key) || !is_label_value(value) {
        return Err("at most 63 letters, digits, '-', '_' and '.' in key and value".into());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// `NAME` or `NAME=COUNT`.
pub fn class(text: &str) -> Result<(Name, u32), String> {
    let (name, count) = text.split_once('=').unwrap_or((text, "1"));
    let name = name.parse().map_err(|e| format!("{name:?}: {e}"))?;
    let count = count.parse().ok().filter(|n| *n > 0);
    Ok((name, count.ok_or_else(|| "a count is a whole number from 1".to_owned())?))
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn valid(object: &Value) {
        (kind::find("app").unwrap().parse_spec)(&object["spec"]).unwrap();
    }

    #[test]
    fn ports_variables_labels_and_classes_are_read() {
        assert_eq!(port("80").unwrap(), Port { port: 80, protocol: Protocol::Http, name: None });
        assert_eq!(port("81/h2c").unwrap().protocol, Protocol::H2c);
        assert_eq!(port("9000/tcp").unwrap().protocol, Protocol::Tcp);
        for wrong in ["", "0", "65536", "+80", "80/udp", "a"] {
            assert!(port(wrong).is_err(), "{wrong}");
        }
        assert_eq!(variable("A=b=c").unwrap(), ("A".into(), "b=c".into()));
        assert_eq!(variable("A=").unwrap().1, "");
        assert!(variable("A").is_err() && variable("=b").is_err() && variable("A B=c").is_err());
        assert!(label("tier=front").is_ok() && label("tier").is_err() && label("a b=c").is_err());
        assert_eq!(class("gpu").unwrap(), (name("gpu"), 1));
        assert_eq!(class("gpu=2").unwrap(), (name("gpu"), 2));
        assert!(class("gpu=0").is_err() && class("GPU").is_err());
    }

    #[test]
    fn secrets_are_named_by_what_they_become() {
        let env = secret("PASSWORD=db/pass.word@3").unwrap();
        assert_eq!((env.name.as_str(), env.version, &env.env["PASSWORD"]), ("db", Some(3), &"pass.word".to_owned()));
        assert_eq!(secret("/srv/tls=tls").unwrap().folder().as_deref(), Some("/srv/tls"));
        assert_eq!(secret("tls").unwrap().folder().as_deref(), Some("/run/secrets/tls"));
        for wrong in ["A=db", "Db", "db@0", "db@x", "="] {
            assert!(secret(wrong).is_err(), "{wrong}");
        }
        let all = |texts: &[&str]| texts.iter().map(|t| secret(t).unwrap()).collect::<Vec<_>>();
        let two = with_secrets(all(&["A=db/a", "tls"]), &all(&["B=db/b", "tls@2"]));
        assert_eq!(two.len(), 2);
        assert_eq!((two[0].env.len(), two[1].version), (2, Some(2)));
        assert_eq!(with_secrets(all(&["A=db/a"]), &all(&["A=other/a"])), all(&["A=other/a"]));
    }

    #[test]
    fn a_new_container_serves_port_80_and_a_function_none_of_its_own() {
        let container = app(&name("web"), None, &Wanted::default(), Some(ImageFormat::Oci));
        assert_eq!(container["spec"]["image"], "web");
        assert_eq!(container["spec"]["ports"], json!([{"port": 80, "protocol": "http"}]));
        valid(&container);
        let function = app(&name("f"), None, &Wanted::default(), Some(ImageFormat::Wasm));
        assert_eq!(function["spec"]["runtime"], "function");
        assert!(function["spec"].get("ports").is_none() && function["metadata"].get("labels").is_none());
        valid(&function);
    }

    #[test]
    fn all_flags_make_a_valid_spec() {
        let wanted = Wanted {
            image: Some(name("img")),
            runtime: Some(Runtime::Container),
            replicas: Some(Replicas::Count(3)),
            ports: vec![port("8080/h2c").unwrap(), port("9/tcp").unwrap()],
            env: vec![("A".into(), "b".into())],
            labels: vec![("tier".into(), "front".into())],
            secrets: vec![secret("A_KEY=db/key").unwrap(), secret("tls").unwrap()],
            nics: vec![nic("front").unwrap(), nic("back:db,admin").unwrap()],
            network: None,
            cpu: Some("250m".parse().unwrap()),
            memory: Some("128Mi".parse().unwrap()),
            scratch: Some("1Gi".parse().unwrap()),
            pids: Some(9),
            command: vec!["sh".into()],
            args: vec!["-c".into()],
            spread: Some(Spread::Host),
            classes: vec![class("gpu=2").unwrap()],
            storage_class: Some(name("high-iops")),
            constraints: Some("latency<20ms, zone in (a,b)".parse().unwrap()),
            health_path: Some("/up".into()),
            regions: vec![name("eu")],
            rollout: json!({"strategy": "canary", "steps": [{"percent": 10}], "header": null})
                .as_object()
                .unwrap()
                .clone(),
            disruption: Some("min-available=2".parse().unwrap()),
        };
        let object = app(&name("web"), None, &wanted, None);
        valid(&object);
        let spec = &object["spec"];
        assert_eq!(spec["resources"], json!({"cpu": "250m", "memory": "128Mi", "scratch": "1Gi", "pids": 9}));
        assert_eq!(spec["health"]["readiness"]["probe"], json!({"http": {"port": 8080, "path": "/up"}}));
        assert_eq!((&spec["regions"], &spec["disruption"]), (&json!(["eu"]), &json!({"minAvailable": 2})));
        assert_eq!(spec["rollout"], json!({"strategy": "canary", "steps": [{"percent": 10}]}));
        assert_eq!((&spec["spread"], &spec["classes"]), (&json!("host"), &json!({"gpu": 2})));
        assert_eq!(spec["constraints"], json!(["latency<20ms", "zone in (a,b)"]));
        assert_eq!(spec["storageClass"], "high-iops");
        assert_eq!(object["metadata"]["labels"], json!({"tier": "front"}));
        let none = Wanted { constraints: Some("".parse().unwrap()), ..Wanted::default() };
        assert!(app(&name("web"), Some(&object), &none, None)["spec"].get("constraints").is_none());
    }

    #[test]
    fn an_update_changes_only_what_was_asked() {
        let existing = json!({
            "metadata": {"name": "web", "uid": "u", "revision": 4, "labels": {"a": "b"}, "deletionProtection": true},
            "spec": {"image": "v1", "runtime": "container", "replicas": 2, "ports": [{"port": 1}], "env": {"A": "1"}},
            "status": {"phase": "Ready"},
        });
        let wanted = Wanted { env: vec![("B".into(), "2".into())], ..Wanted::default() };
        let object = app(&name("web"), Some(&existing), &wanted, Some(ImageFormat::Oci));
        let spec = json!({"image": "v1", "runtime": "container", "replicas": 2, "ports": [{"port": 1}],
            "env": {"A": "1", "B": "2"}});
        assert_eq!(object["spec"], spec);
        assert_eq!(object["metadata"], json!({"name": "web", "labels": {"a": "b"}, "deletionProtection": true}));
        assert!(object.get("status").is_none());
    }

    #[test]
    fn auto_replicas_are_the_clouds_until_somebody_counts() {
        let auto = Wanted { replicas: Some(replicas("auto").unwrap()), ..Wanted::default() };
        let object = app(&name("web"), None, &auto, Some(ImageFormat::Oci));
        valid(&object);
        assert_eq!(object["spec"]["autoscale"]["strategy"], "predictive");
        let mut held = object.clone();
        held["spec"]["autoscale"] = json!({"maxReplicas": 99});
        assert_eq!(app(&name("web"), Some(&held), &auto, None)["spec"]["autoscale"], json!({"maxReplicas": 99}));
        let counted = Wanted { replicas: Some(replicas("3").unwrap()), ..Wanted::default() };
        let object = app(&name("web"), Some(&held), &counted, None);
        assert!(object["spec"].get("autoscale").is_none() && object["spec"]["replicas"] == 3);
        assert!(replicas("many").is_err() && replicas("10001").is_err());
    }

    #[test]
    fn a_container_that_becomes_a_function_leaves_its_ports() {
        let existing = json!({"metadata": {"name": "web"}, "spec": {
            "image": "v1", "runtime": "container", "ports": [{"port": 1}], "command": ["x"]}});
        let object = app(&name("web"), Some(&existing), &Wanted::default(), Some(ImageFormat::Wasm));
        assert_eq!(object["spec"], json!({"image": "v1", "runtime": "function"}));
        valid(&object);
    }
}
