//! Secrets on a host: against a source that answers what it is told, in a folder of the disk.

use std::collections::BTreeMap;
use std::sync::Mutex;

use nexus_model::SecretValue;
use nexus_model::kind::{ImageFormat, Template};
use nexus_model::plan::{Desired, ImagePlan};

use super::*;

/// Answers versions by name, newest last; `None`: no server is there.
#[derive(Default)]
struct Source(Mutex<Option<BTreeMap<String, Vec<WorkloadSecret>>>>);

#[async_trait]
impl SecretSource for Source {
    async fn secret(&self, _: Uid, name: &Name, version: Option<u64>) -> Result<WorkloadSecret, IssueError> {
        let held = self.0.lock().unwrap();
        let Some(held) = &*held else { return Err(IssueError::Unreachable("nobody answers".into())) };
        let versions = held.get(name.as_str()).map_or(&[][..], |v| v);
        let wanted = |s: &&WorkloadSecret| version.is_none_or(|v| s.version == v);
        versions.iter().rfind(wanted).cloned().ok_or_else(|| IssueError::Refused(format!("there is no secret {name}")))
    }
}

impl Source {
    fn put(&self, name: &str, values: &[(&str, &[u8])]) {
        let mut held = self.0.lock().unwrap();
        let versions = held.get_or_insert_default().entry(name.into()).or_default();
        let data = values.iter().map(|(k, v)| ((*k).to_owned(), SecretValue::new(v.to_vec())));
        versions.push(WorkloadSecret { version: versions.len() as u64 + 1, data: SecretData(data.collect()) });
    }
}

fn plan(refs: serde_json::Value, newest: &[(&str, u64)]) -> Arc<InstancePlan> {
    let secrets: Vec<SecretRef> = serde_json::from_value(refs).unwrap();
    Arc::new(InstancePlan {
        uid: Uid::from_random([1; 16]),
        name: "web-1".parse().unwrap(),
        project: "shop".parse().unwrap(),
        app: "web".parse().unwrap(),
        epoch: 1,
        desired: Desired::Running,
        template: Template { secrets, ..Template::default() },
        image: ImagePlan { format: ImageFormat::Oci, digest: nexus_model::Digest::of(b"i") },
        address6: std::net::Ipv6Addr::LOCALHOST,
        address4: std::net::Ipv4Addr::LOCALHOST,
        nics: Vec::new(),
        secrets: newest.iter().map(|(name, version)| (name.parse().unwrap(), *version)).collect(),
        request_id: None,
        once: false,
        kept: false,
        numa_nodes: Vec::new(),
        part_digests: Default::default(),
    })
}

fn host() -> (tempfile::TempDir, Arc<Source>, Arc<Secrets>) {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Source::default());
    let secrets = Arc::new(Secrets::new(dir.path().to_owned(), source.clone()));
    (dir, source, secrets)
}

async fn until(mut holds: impl FnMut() -> bool) {
    let met = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), met).await.expect("in time");
}

#[tokio::test]
async fn files_and_variables_are_laid_ready_and_only_their_owner_reads_them() {
    let (_dir, source, secrets) = host();
    source.put("tls", &[("tls.crt", b"cert"), ("tls.key", &[0, 255])]);
    source.put("db", &[("password", b"a=b c\n")]);
    let refs =
        serde_json::json!([{"name": "tls", "path": "/srv/tls"}, {"name": "db", "env": {"PASSWORD": "password"}}]);
    let plan = plan(refs, &[("tls", 1)]);
    secrets.prepare(Uid::default(), &plan).await.unwrap();
    let mounts = secrets.mounts(&plan);
    assert_eq!(mounts.read_env().unwrap(), ["PASSWORD=a=b c\n"]);
    assert_eq!(mounts.folders.len(), 1);
    let folder = &mounts.folders[0];
    assert_eq!(folder.destination, "/srv/tls");
    assert_eq!(fs::read(folder.source.join("tls.key")).unwrap(), [0, 255]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder.source.join("tls.key")), mode(mounts.env.as_ref().unwrap())), (0o400, 0o600));
    let noted = fs::read_to_string(secrets.of(plan.uid).join("delivered.json")).unwrap();
    assert!(!noted.contains("cert\""), "versions and names alone: {noted}");
    assert_eq!(secrets.known().await.unwrap(), [plan.uid]);
    secrets.remove(plan.uid).await.unwrap();
    secrets.remove(plan.uid).await.unwrap();
    assert!(secrets.known().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_new_version_takes_the_place_of_all_files_at_once() {
    let (_dir, source, secrets) = host();
    source.put("tls", &[("a", b"1"), ("gone", b"1")]);
    let refs = serde_json::json!([{"name": "tls"}]);
    let first = plan(refs.clone(), &[("tls", 1)]);
    secrets.prepare(Uid::default(), &first).await.unwrap();
    let folder = secrets.mounts(&first).folders.remove(0).source;
    let inode = fs::metadata(&folder).unwrap().ino();

    source.put("tls", &[("a", b"2"), ("new", b"2")]);
    let second = plan(refs.clone(), &[("tls", 2)]);
    let follower = secrets.follow(Uid::default(), &second);
    until(|| fs::read(folder.join("new")).is_ok_and(|v| v == b"2")).await;
    until(|| !folder.join("gone").exists() && !folder.join("..1").exists()).await;
    assert_eq!(fs::read(folder.join("a")).unwrap(), b"2");
    assert_eq!(fs::metadata(&folder).unwrap().ino(), inode, "a running container sees this very folder");
    drop(follower);

    // A server that is behind is asked again; a plan that is already true asks nobody.
    let third = plan(refs, &[("tls", 3)]);
    assert!(secrets.catch_up(Uid::default(), &third).await.unwrap_err().contains("knows no version 3"));
    source.put("tls", &[("a", b"3")]);
    secrets.catch_up(Uid::default(), &third).await.unwrap();
    assert_eq!(fs::read(folder.join("a")).unwrap(), b"3");
    *source.0.lock().unwrap() = None;
    secrets.catch_up(Uid::default(), &third).await.unwrap();
}

#[tokio::test]
async fn without_servers_an_instance_starts_again_with_what_is_here_and_never_with_less() {
    let (_dir, source, secrets) = host();
    source.put("tls", &[("a", b"1")]);
    let one = serde_json::json!([{"name": "tls"}]);
    secrets.prepare(Uid::default(), &plan(one.clone(), &[])).await.unwrap();
    *source.0.lock().unwrap() = None;
    secrets.prepare(Uid::default(), &plan(one, &[])).await.unwrap();
    let more = plan(serde_json::json!([{"name": "tls"}, {"name": "db"}]), &[]);
    assert!(secrets.prepare(Uid::default(), &more).await.unwrap_err().contains("no server can be reached"));
    // What a server refuses is not there.
    source.put("tls", &[("a", b"1")]);
    assert!(secrets.prepare(Uid::default(), &more).await.unwrap_err().contains("there is no secret db"));
    source.put("db", &[("raw", &[0])]);
    let wrong = |key: &str| plan(serde_json::json!([{"name": "db", "env": {"X": key}}]), &[]);
    assert!(secrets.prepare(Uid::default(), &wrong("none")).await.unwrap_err().contains("has no key none"));
    assert!(secrets.prepare(Uid::default(), &wrong("raw")).await.unwrap_err().contains("mount it as a file"));
}
