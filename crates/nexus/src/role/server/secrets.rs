//! The values of secrets for the instances of hosts.
//!
//! A host asks for an instance and a secret. It gets the values only while this server's own copy of the log says that the
//! instance is placed on that very host, and only of a secret that the instance's own template names, in the version that it
//! names. So a host that was broken into learns the secrets of what runs on it, and no others.
//!
//! Everything is read from this server's own copies, so values are given out without a majority too. Each delivery is a note in
//! this server's chain of the audit log.

use std::sync::Arc;

use nexus_control::audit::Notes;
use nexus_control::intent::Provenance;
use nexus_control::secrets::{OpenError, VersionId};
use nexus_control::view::View;
use nexus_env::{Env, RngExt as _};
use nexus_iam::envelope::KeyProvider;
use nexus_model::kind::{GLOBAL, Kind as _, Secret};
use nexus_model::plan::{WorkloadSecret, WorkloadSecretRequest, method};
use nexus_model::{Code, Name, RequestId};
use nexus_store::{Consistency, Store};
use nexus_wire::{Refusal, ServerBuilder, code};

use super::fleet::Fleet;
use super::southbound::{is_host, listed};
use super::workloads::placed;

pub struct Secrets {
    pub view: View,
    pub fleet: Fleet,
    pub region: Arc<dyn Store>,
    pub global: Arc<dyn Store>,
    pub keys: Arc<dyn KeyProvider>,
    pub notes: Notes,
    pub env: Env,
}

impl Secrets {
    /// Which secret a host is to get, if it may.
    fn named(&self, request: &WorkloadSecretRequest) -> Result<(Name, VersionId), Refusal> {
        let instance = placed(&self.view, &self.fleet, &request.host, request.instance)?;
        let name = &request.name;
        let names = |s: &nexus_model::kind::SecretRef| s.name == *name && s.version == request.version;
        let project = instance.metadata.project.filter(|_| instance.spec.template.parts().all_secrets().any(names));
        let Some(project) = project else {
            let why = format!("instance {} names no such version of a secret {name}", request.instance);
            return Err(Refusal::new(code::FORBIDDEN, why));
        };
        let found = self.view.read(|world| {
            let secret = world.secret(&project, name)?;
            VersionId::of(secret, request.version.unwrap_or(secret.spec.version))
        });
        let found = found.ok_or_else(|| Refusal::new("not-found", format!("there is no secret {name}")))?;
        Ok((project, found))
    }

    async fn secret(&self, request: &WorkloadSecretRequest) -> Result<WorkloadSecret, Refusal> {
        let (project, id) = self.named(request)?;
        let store = if id.region == *GLOBAL { &self.global } else { &self.region };
        let opened = id.open(&**store, &*self.keys, Consistency::Stale).await;
        let answer = opened.map_err(|error| match error {
            OpenError::Missing(..) => Refusal::new("not-found", error.to_string()),
            // Another server may have the key, or its store.
            OpenError::Store(_) | OpenError::Sealed(..) => Refusal::new(code::DRAINING, error.to_string()),
        });
        self.note(request, project, answer.as_ref().map(drop).map_err(|_| Code::Unavailable));
        Ok(WorkloadSecret { version: id.version, data: answer? })
    }

    fn note(&self, request: &WorkloadSecretRequest, project: Name, answer: Result<(), Code>) {
        let by = Provenance { principal: format!("host:{}", request.host), ..Provenance::default() };
        let target = nexus_audit::Target {
            name: request.name.to_string(),
            organization: self.view.read(|world| world.project(&project).map(|p| p.spec.organization.to_string())),
            plural: Secret::PLURAL.to_owned(),
            project: Some(project.to_string()),
            uid: None,
        };
        let id = RequestId::from_random(self.env.rng.bytes());
        let by = Some((&by, request.host.as_str()));
        self.notes.answered(by, "secrets:deliver".to_owned(), Some(target), answer, &id);
    }
}

/// What agents may call.
pub fn methods(builder: ServerBuilder, secrets: &Arc<Secrets>) -> ServerBuilder {
    let secrets = secrets.clone();
    builder.unary(method::WORKLOAD_SECRET, move |caller, request: WorkloadSecretRequest| {
        let secrets = secrets.clone();
        async move {
            is_host(&caller, &request.host)?;
            listed(&secrets.view).await?;
            secrets.secret(&request).await
        }
    })
}

#[cfg(test)]
#[path = "secrets_tests.rs"]
mod tests;
