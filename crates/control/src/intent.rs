//! What users ask of a region, and what they are answered.

use std::net::IpAddr;

use async_trait::async_trait;
use nexus_audit::Anchor;
use nexus_model::kind::SigningSecret;
use nexus_model::{AnyObject, ApiError, Name, RequestId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which object an intent is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// The kind's plural, as in its path.
    pub plural: String,
    /// Present exactly for kinds of a project.
    pub project: Option<Name>,
    /// Present exactly for kinds of an organization.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<Name>,
    pub name: Name,
}

impl Target {
    /// What the name is unique in, beside the kind.
    pub fn within(&self) -> Option<&Name> {
        self.project.as_ref().or(self.organization.as_ref())
    }
}

/// What is to be done. Specs have been parsed strictly and carry their defaults already; what depends on the region's
/// state (names, quota, preconditions, immutability, protection) is decided by the writer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Change {
    /// Fails with `already-exists` if the name is taken.
    Create {
        object: AnyObject,
    },
    /// Creates or replaces labels, annotations, deletion protection and spec.
    Put {
        object: AnyObject,
    },
    /// A merge patch (RFC 7396) over the whole object; the result is parsed strictly by the writer.
    Patch {
        patch: Value,
    },
    Delete,
    /// What is ordered while an app's rollout runs.
    Rollout {
        order: RolloutOrder,
    },
    /// Not of an object's spec, but of what is told to others' servers.
    Tell {
        deed: Telling,
    },
    /// Not of an object: moves instances to where they stand better, at most so many. With `dry_run`, only says which.
    Rebalance {
        most: u32,
    },
    /// Not of an object, but of the audit log itself.
    Audit {
        deed: Deed,
    },
}

/// An order about the rollout of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RolloutOrder {
    Pause,
    /// Goes on: after a pause, to the next step, or again after a failure.
    Resume,
    /// Skips the steps that are left.
    Promote,
    /// Goes back to a revision that is kept; the one before the newest, without its number.
    Undo {
        to: Option<u64>,
    },
}

/// What is done about deliveries, beside reading and deleting them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Telling {
    /// A server has tried to send the target.
    Attempted(Attempt),
    /// The target is to be sent again.
    Resend,
    /// The target, a webhook, is to be told something.
    Test,
}

/// One try of a delivery.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// From 1, so that one try is not counted twice.
    pub number: u32,
    /// The receiver took it.
    pub taken: bool,
    /// Another try would do no better.
    pub fatal: bool,
    /// There is nobody to send it to any more.
    pub obsolete: bool,
    /// What came of it, in few words.
    pub message: String,
}

/// Who is to be told when a change has come to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Callback {
    pub url: String,
    pub secret: SigningSecret,
}

/// What is done to the audit log, beside what is written into it with every change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Deed {
    /// Settles records of a server's own chain.
    Anchor(Anchor),
    /// Shreds the personal data of a principal, named as in [`Provenance::principal`], in all records of this group.
    Forget { principal: String },
}

/// Who asks, from where and by what right, as the server that took the request knows it: for the audit log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Provenance {
    /// `{kind}:{organization}/{name}`, or `{kind}:{name}` of what belongs to none; the kinds are those of the audit log's actors.
    /// Empty: an operator with the intent's `actor` as its name.
    pub principal: String,
    pub address: Option<IpAddr>,
    /// The ids of the policies that allowed it.
    pub policies: Vec<String>,
    pub session: Option<String>,
    /// Not for the log: whom they want to be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub callback: Option<Callback>,
}

/// One request to the writer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Intent {
    pub request_id: RequestId,
    /// Who asks, for events.
    pub actor: String,
    #[serde(default)]
    pub by: Provenance,
    pub target: Target,
    pub change: Change,
    /// The revision that the object must have (`If-Match`).
    pub if_match: Option<u64>,
    /// 1 to 128 printable ASCII characters. A retry with the same key and the same request returns the first answer; the same
    /// key with another request is refused.
    pub idempotency_key: Option<String>,
    /// Decide everything, commit nothing.
    pub dry_run: bool,
}

/// An intent on its way to a writer that the sender can't reach by itself. The way is in it and only gets shorter, so it
/// can't go round; and nobody on it sends it twice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Passed {
    /// The server whose writer it is for.
    pub to: u64,
    /// Those who still have to pass it on, in order.
    pub hops: Vec<u64>,
    /// How long the receiver may take.
    pub budget_ms: u64,
    pub intent: Intent,
}

/// The writer's answer to an intent that it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Accepted {
    /// The object as committed; for a delete, its tombstone.
    pub object: AnyObject,
    /// A new object was made.
    pub created: bool,
    /// The first answer again, to a repeated idempotency key.
    pub replayed: bool,
}

/// The door to a region's writer, wherever it runs now.
#[async_trait]
pub trait Writer: Send + Sync {
    /// Answers when the intent is durable on a majority, or why it was not taken. `unavailable` means that nothing was
    /// committed; `timeout` that it may have been.
    async fn submit(&self, intent: Intent) -> Result<Accepted, ApiError>;
}
