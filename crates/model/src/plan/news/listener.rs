//! The agent's side: what it holds, and what a server's messages make of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{HostNetworks, NetworkPlan, NetworksMessage, NetworksRequest, digest_of, digest_of_all, head};
use crate::plan::PLAN_VERSION;
use crate::{Digest, Name, Uid};

/// Why a message is not followed. Another request is to be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NewsError {
    #[error("networks of version {0} need a newer agent")]
    Version(u32),
    #[error("a change of network {0}, of which nothing is held")]
    Unknown(Uid),
    #[error("a change of network {0} is not of the plan that is held")]
    Foreign(Uid),
    #[error("network {0} has not come out as the server has it")]
    Network(Uid),
    #[error("the networks of this host have not come out as the server has them")]
    Host,
}

/// What an agent holds of its host's networks.
#[derive(Debug)]
pub struct Listener {
    host: Name,
    held: Option<Arc<HostNetworks>>,
    /// What comes of the messages of the stream that is heard.
    draft: BTreeMap<Uid, Draft>,
    tunnels: Vec<IpAddr>,
    /// Something came out wrong: everything is to be told again, and is then believed.
    doubts: bool,
    checks: bool,
}

#[derive(Debug)]
struct Draft {
    plan: Arc<NetworkPlan>,
    /// As the server said last.
    digest: Option<Digest>,
    /// The plan has this digest.
    checked: bool,
}

impl Listener {
    pub fn new(host: Name, held: Option<Arc<HostNetworks>>) -> Self {
        let (draft, tunnels) = Default::default();
        Self { host, held, draft, tunnels, doubts: false, checks: true }
    }

    pub fn held(&self) -> Option<&Arc<HostNetworks>> {
        self.held.as_ref()
    }

    /// What begins a stream. Messages of the one before don't count any more.
    pub fn request(&mut self) -> NetworksRequest {
        self.checks = !self.doubts;
        let held = self.held.iter().filter(|_| self.checks).flat_map(|held| &held.networks);
        let mut before = std::mem::take(&mut self.draft);
        let draft = |plan: &Arc<NetworkPlan>| {
            let same = before.remove(&plan.uid).filter(|d| d.checked && Arc::ptr_eq(&d.plan, plan));
            let new = || Draft { plan: plan.clone(), digest: Some(digest_of(&**plan).0), checked: true };
            (plan.uid, same.unwrap_or_else(new))
        };
        self.draft = held.map(draft).collect();
        self.tunnels = Vec::new();
        let have = self.draft.iter().filter_map(|(uid, draft)| Some((*uid, draft.digest?))).collect();
        NetworksRequest { host: self.host.clone(), known: self.held.as_ref().map(|h| h.revision), have: Some(have) }
    }

    /// Takes the next message; answers what the host is to have, if that is new and complete.
    ///
    /// # Errors
    /// The message is not followed, and no other of its stream can be: another request is to be made.
    pub fn take(&mut self, message: NetworksMessage) -> Result<Option<Arc<HostNetworks>>, NewsError> {
        if message.version > PLAN_VERSION {
            return Err(NewsError::Version(message.version));
        }
        let taken = self.followed(message);
        self.doubts = match &taken {
            Ok(None) => self.doubts,
            Ok(Some(_)) => false,
            Err(_) => true,
        };
        let Some(told) = taken? else { return Ok(None) };
        if self.held.as_ref().is_some_and(|held| told.revision < held.revision || told == **held) {
            return Ok(None);
        }
        self.held = Some(Arc::new(told));
        Ok(self.held.clone())
    }

    fn followed(&mut self, message: NetworksMessage) -> Result<Option<HostNetworks>, NewsError> {
        let NetworksMessage { version, host, revision, endpoint, tunnels, networks, news } = message;
        let Some(news) = news else {
            return Ok(Some(HostNetworks { version, host, revision, endpoint, tunnels, networks }));
        };
        for uid in &news.gone {
            self.draft.remove(uid);
        }
        if !news.same_tunnels {
            self.tunnels = tunnels;
        }
        for change in &news.changes {
            let uid = change.head.uid;
            let nothing = head(&change.head);
            let old = match self.draft.get(&uid) {
                _ if change.anew => &nothing,
                Some(draft) => &*draft.plan,
                None => return Err(NewsError::Unknown(uid)),
            };
            let plan = change.applied(old).map_err(|_| NewsError::Foreign(uid))?;
            self.draft.insert(uid, Draft { plan: Arc::new(plan), digest: change.digest, checked: false });
        }
        if news.more {
            return Ok(None);
        }
        let mut wrong = None;
        for (uid, draft) in self.draft.iter_mut().filter(|(_, draft)| !draft.checked) {
            draft.checked = draft.digest == Some(digest_of(&*draft.plan).0);
            wrong = wrong.or((!draft.checked).then_some(NewsError::Network(*uid)));
        }
        let digests = self.draft.iter().filter_map(|(uid, draft)| Some((uid, draft.digest.as_ref()?)));
        if digest_of_all(endpoint, &self.tunnels, digests) != news.digest {
            wrong = wrong.or(Some(NewsError::Host));
        }
        match wrong {
            Some(wrong) if self.checks => return Err(wrong),
            // What was told anew and came out right can be relied on again.
            wrong => self.checks = wrong.is_none(),
        }
        let networks = self.draft.values().map(|draft| draft.plan.clone()).collect();
        Ok(Some(HostNetworks { version, host, revision, endpoint, tunnels: self.tunnels.clone(), networks }))
    }
}
