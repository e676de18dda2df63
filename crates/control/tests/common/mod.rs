//! What the tests of this room share: names, intents, hosts that behave; and, in [`net`], servers that talk.
#![allow(dead_code)] // Each test program uses a part of it.

pub mod net;

use nexus_control::intent::{Change, Intent, Provenance, Target};
use nexus_model::kind::*;
use nexus_model::plan::{HostReport, InstanceReport};
use nexus_model::{Digest, Metadata, Name, Object};

pub fn name(s: &str) -> Name {
    s.parse().unwrap()
}

pub fn web(replicas: u32) -> AppSpec {
    AppSpec { image: name("web"), replicas, ..App::example() }
}

pub fn image(content: &str) -> ImageSpec {
    let digest = Digest::of(content.as_bytes());
    ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 1 }], source: None }
}

pub fn intent(plural: &str, project: Option<&str>, object: &str, change: Change) -> Intent {
    Intent {
        request_id: "req-1".parse().unwrap(),
        actor: "admin".into(),
        by: Provenance::default(),
        target: Target { plural: plural.into(), project: project.map(name), organization: None, name: name(object) },
        change,
        if_match: None,
        idempotency_key: None,
        dry_run: false,
    }
}

pub fn create<K: Kind>(project: Option<&str>, object: &str, spec: K::Spec) -> Intent {
    let any = Object::<K>::new(Metadata::new(name(object), project.map(name)), spec).to_any();
    intent(K::PLURAL, project, object, Change::Create { object: any })
}

/// The host number `n`, with addresses that no other has.
pub fn host(zone: &str, cell: &str, n: u8, capacity: Capacity) -> HostSpec {
    HostSpec {
        zone: name(zone),
        cell: name(cell),
        address: format!("[fd00::{n:x}]:7440").parse().unwrap(),
        prefix6: format!("fd00:0:0:{n:x}::").parse().unwrap(),
        prefix4: [10, 97, n, 0].into(),
        runtimes: vec![Runtime::Container, Runtime::Function],
        capacity,
        ..HostSpec::default()
    }
}

/// What an agent says that runs these instances.
pub fn report<'a>(
    host: &Name,
    spec: HostSpec,
    applied: u64,
    runs: impl IntoIterator<Item = &'a Object<Instance>>,
) -> HostReport {
    let runs = runs.into_iter().map(|i| InstanceReport {
        uid: i.metadata.uid,
        epoch: i.status.epoch,
        phase: InstancePhase::Running,
        ready: true,
        endpoint: Some((i.status.address6.unwrap(), 80).into()),
        restarts: 0,
        started: None,
        exit_code: None,
        message: String::new(),
        parts: Vec::new(),
    });
    HostReport {
        host: host.clone(),
        spec,
        boot_id: "boot-1".into(),
        agent_version: "test".into(),
        applied: Some(applied),
        instances: runs.collect(),
        images: Vec::new(),
        load: 0.1,
        networks: Some(applied),
        certificate_ends: None,
        usage: Vec::new(),
        telemetry: Default::default(),
        failing: None,
    }
}
