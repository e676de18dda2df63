//! Sends what is to be told to others' servers: for each group, the server that leads it follows the rows of deliveries, and
//! POSTs each when it is due. What came of a try goes to the group's writer, which decides when the next one is; so the next
//! leader goes on where this one ended, and sends again what was on its way: receivers know a message by its id.
//!
//! Of what one webhook tells about one object, only the oldest is on its way at a time. Whoever is slow or down holds up
//! nobody else: a project has a few requests at once, and each a bounded time. URLs are tenants': see
//! [`outbound`](super::outbound).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nexus_api::WebhookDoor;
use nexus_control::intent::{Accepted, Attempt, Change, Intent, Provenance, Target, Telling, Writer};
use nexus_control::secrets::VersionId;
use nexus_env::{Env, RngExt as _};
use nexus_iam::envelope::KeyProvider;
use nexus_iam::webhook::{ID_HEADER, SIGNATURE_HEADER, SigningKey, TIME_HEADER};
use nexus_model::kind::{self, Delivery, DeliveryPhase, Kind, Secret, SigningSecret, Webhook};
use nexus_model::{AnyObject, ApiError, Code, Name, Object, RequestId, Timestamp, Uid, key};
use nexus_store::{Consistency, KeyValue, RangeRequest, Revision, Store, StoreError, WatchEvent};
use reqwest::header::CONTENT_TYPE;
use reqwest::{StatusCode, Url};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::delivery_figures::{Figures, Receiver};
use super::outbound::{Outbound, is_elsewhere, told};

/// How long a receiver may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests at once: all, and of one project.
const AT_ONCE: usize = 64;
const OF_ONE_PROJECT: usize = 8;
/// How often a leader looks at what is due, whatever happens.
const LOOK: Duration = Duration::from_secs(5);
/// Between tries to follow the rows, or to bring what came of a try.
const RETRY: Duration = Duration::from_millis(500);
/// After these, what was sent is sent again: its receiver knows it.
const BROUGHT_AT_MOST: usize = 10;
const PAGE: usize = 500;
const CLOUD_EVENT: &str = "application/cloudevents+json; charset=utf-8";

pub const SETTING: &str = "webhook_networks";

/// The way to receivers.
pub fn door(networks: &[String]) -> anyhow::Result<Arc<Outbound>> {
    Ok(Arc::new(Outbound::new(networks, SETTING, PATIENCE)?))
}

/// Judges what users bring, where that can be done without looking a name up.
pub struct Judge(pub Arc<Outbound>);

impl WebhookDoor for Judge {
    fn refuses(&self, url: &str) -> Option<String> {
        let url: Url = url.parse().ok()?;
        self.0.to(&url).err().map(|elsewhere| elsewhere.to_string())
    }
}

/// What a try needs.
pub struct Sender {
    pub server: Name,
    pub env: Env,
    /// The group's own.
    pub store: Arc<dyn Store>,
    pub writer: Arc<dyn Writer>,
    /// Where secrets are, in the order in which they are looked for.
    pub secrets: Vec<Arc<dyn Store>>,
    pub keys: Arc<dyn KeyProvider>,
    pub door: Arc<Outbound>,
    /// How the group is called in figures: `global`, or the region.
    pub group: String,
    pub figures: Figures,
}

/// What is on its way, by the keys of its rows: in the order in which it is sent.
#[derive(Default)]
struct Queue {
    rows: BTreeMap<String, Row>,
    busy: BTreeSet<String>,
}

struct Row {
    revision: u64,
    delivery: Object<Delivery>,
}

impl Queue {
    fn put(&mut self, key: String, revision: u64, delivery: Object<Delivery>) {
        if self.rows.get(&key).is_some_and(|known| known.revision >= revision) {
            return;
        }
        match delivery.status.phase {
            DeliveryPhase::Pending => drop(self.rows.insert(key, Row { revision, delivery })),
            _ => drop(self.rows.remove(&key)),
        }
    }

    fn take_in(&mut self, kv: &KeyValue) {
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        match Object::<Delivery>::from_slice(&kv.value) {
            Ok(delivery) => self.put(key, kv.mod_revision.0, delivery),
            Err(error) => tracing::error!(%error, key, "a delivery can't be read; it is left alone"),
        }
    }

    /// How many wait for each receiver.
    fn waiting(&self, group: &str) -> BTreeMap<Receiver, u64> {
        let mut waiting = BTreeMap::new();
        for row in self.rows.values() {
            *waiting.entry(Receiver::of(group, &row.delivery)).or_default() += 1;
        }
        waiting
    }

    /// Takes what is due out, as far as there is room; answers when to look again at the latest.
    fn due(&mut self, now: Timestamp) -> (Vec<(String, Object<Delivery>)>, Duration) {
        let project = |d: &Object<Delivery>| d.metadata.project.clone();
        let mut of_project: BTreeMap<Option<Name>, usize> = BTreeMap::new();
        for row in self.busy.iter().filter_map(|key| self.rows.get(key)) {
            *of_project.entry(project(&row.delivery)).or_default() += 1;
        }
        let (mut lanes, mut found, mut wait) = (BTreeSet::new(), Vec::new(), LOOK);
        for (key, Row { delivery, .. }) in &self.rows {
            // What came before about the same object goes first, also while it waits for its next try.
            if !lanes.insert(lane(delivery)) || self.busy.contains(key) {
                continue;
            }
            let next = delivery.status.next.unwrap_or(now);
            if next > now {
                wait = wait.min(next.since(now));
                continue;
            }
            let running = of_project.entry(project(delivery)).or_default();
            if *running < OF_ONE_PROJECT && self.busy.len() + found.len() < AT_ONCE {
                *running += 1;
                found.push((key.clone(), delivery.clone()));
            }
        }
        self.busy.extend(found.iter().map(|(key, _)| key.clone()));
        (found, wait)
    }
}

/// The webhook and the object; a callback is alone.
fn lane(delivery: &Object<Delivery>) -> (Uid, Uid) {
    match &delivery.metadata.owner {
        Some(hook) => (hook.uid, delivery.spec.regarding.uid),
        None => (delivery.metadata.uid, delivery.metadata.uid),
    }
}

impl Sender {
    /// Sends while this server leads, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let work = async {
            let mut leadership = self.store.leadership();
            loop {
                let Ok(now) = leadership.wait_for(|l| l.is_self).await.map(|l| *l) else { return };
                let led = tokio::select! {
                    biased;
                    changed = leadership.wait_for(|l| !l.is_self || l.epoch != now.epoch) => match changed {
                        Ok(_) => Ok(()),
                        Err(_) => return,
                    },
                    led = self.lead() => led,
                };
                // They wait at whoever leads now.
                self.figures.waiting(&self.group, &BTreeMap::new());
                match led {
                    Ok(()) => {}
                    Err(StoreError::Closed) => return,
                    Err(error) => tracing::warn!(%error, "deliveries can't be followed; trying again"),
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Follows the rows and sends what is due, until they can't be followed.
    async fn lead(self: &Arc<Self>) -> Result<(), StoreError> {
        let prefix = key::objects(kind::stored(Delivery::PLURAL).expect("every kind is listed"), None);
        let (mut queue, revision) = self.list(&prefix).await?;
        let mut watch = self.store.watch(prefix.clone().into(), key::prefix_end(&prefix).into(), revision).await?;
        let mut tries = JoinSet::new();
        loop {
            self.figures.waiting(&self.group, &queue.waiting(&self.group));
            let (due, wait) = queue.due(Timestamp::from_millis(self.env.now_millis()));
            for (key, delivery) in due {
                let sender = self.clone();
                tries.spawn(async move { (key, sender.send(&delivery).await) });
            }
            tokio::select! {
                biased;
                batch = watch.next() => match batch {
                    Some(Ok(batch)) => for event in &batch.events {
                        match event {
                            WatchEvent::Put { kv, .. } => queue.take_in(kv),
                            WatchEvent::Delete { key, .. } => {
                                queue.rows.remove(&*String::from_utf8_lossy(key));
                            }
                        }
                    },
                    // It fell behind: list again.
                    _ => return Ok(()),
                },
                Some(done) = tries.join_next() => {
                    // One that panicked is not told apart any more: all begin anew.
                    let Ok((key, after)) = done else { return Ok(()) };
                    queue.busy.remove(&key);
                    if let Some(delivery) = after.and_then(|object| Object::<Delivery>::from_any(&object).ok()) {
                        queue.put(key, delivery.metadata.revision, delivery);
                    }
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn list(&self, prefix: &str) -> Result<(Queue, Revision), StoreError> {
        let (mut queue, mut at) = (Queue::default(), None);
        let mut start = Bytes::copy_from_slice(prefix.as_bytes());
        loop {
            let mut request = RangeRequest::new(start, key::prefix_end(prefix)).limit(PAGE);
            request.at = at;
            let page = self.store.range(request).await?;
            at.get_or_insert(page.revision);
            page.kvs.iter().for_each(|kv| queue.take_in(kv));
            match page.kvs.last() {
                Some(last) if page.more => start = [&last.key[..], &[0]].concat().into(),
                _ => return Ok((queue, at.unwrap_or_default())),
            }
        }
    }

    /// One try, and bringing what came of it. Answers the delivery as it is then, if that is known.
    async fn send(&self, delivery: &Object<Delivery>) -> Option<AnyObject> {
        let began = self.env.monotonic();
        let attempt = Attempt { number: delivery.status.attempts + 1, ..self.attempt(delivery).await };
        let receiver = Receiver::of(&self.group, delivery);
        if !attempt.obsolete {
            self.figures.tried(&receiver, attempt.taken, self.env.monotonic().saturating_sub(began));
        }
        if !attempt.taken {
            let (project, id) = (&delivery.metadata.project, delivery.metadata.uid);
            tracing::info!(?project, %id, number = attempt.number, why = attempt.message, "a delivery was not taken");
        }
        for _ in 0..BROUGHT_AT_MOST {
            match self.bring(delivery, attempt.clone()).await {
                Ok(accepted) if !attempt.obsolete => {
                    if accepted.object.status["phase"] == "Dead" {
                        self.figures.died(&receiver);
                    }
                    return Some(accepted.object);
                }
                Ok(_) => return None,
                // It was deleted meanwhile.
                Err(error) if error.code == Code::NotFound => return None,
                Err(error) => tracing::debug!(%error.detail, "what came of a delivery is not written down yet"),
            }
            tokio::time::sleep(RETRY).await;
        }
        None
    }

    async fn bring(&self, delivery: &Object<Delivery>, attempt: Attempt) -> Result<Accepted, ApiError> {
        let m = &delivery.metadata;
        let intent = Intent {
            request_id: RequestId::from_random(self.env.rng.bytes()),
            actor: self.server.to_string(),
            by: Provenance { principal: format!("server:{}", self.server), ..Provenance::default() },
            target: Target {
                plural: Delivery::PLURAL.to_owned(),
                project: m.project.clone(),
                organization: None,
                name: m.name.clone(),
            },
            change: Change::Tell { deed: Telling::Attempted(attempt) },
            if_match: None,
            idempotency_key: None,
            dry_run: false,
        };
        self.writer.submit(intent).await
    }

    /// What came of one try; its number is for the caller to say.
    async fn attempt(&self, delivery: &Object<Delivery>) -> Attempt {
        let failed = |message: String| Attempt { message, ..Attempt::default() };
        let (url, secret) = match self.receiver(delivery).await {
            Ok(Some(receiver)) => receiver,
            Ok(None) => return Attempt { obsolete: true, ..failed("the webhook is gone".to_owned()) },
            Err(attempt) => return attempt,
        };
        let key = match self.signing_key(delivery, &secret).await {
            Ok(key) => key,
            Err(why) => return failed(why),
        };
        let Ok(url) = url.parse::<Url>() else {
            return Attempt { fatal: true, ..failed("its URL can't be read".to_owned()) };
        };
        let http = match self.door.to(&url) {
            Ok(http) => http,
            Err(elsewhere) => return Attempt { fatal: true, ..failed(elsewhere.to_string()) },
        };
        let body = serde_json::to_vec(&delivery.spec.cloud_event(&delivery.metadata)).expect("events are plain data");
        let (id, time) = (delivery.metadata.uid.to_string(), u64::try_from(self.env.now_millis() / 1000).unwrap_or(0));
        let request = http
            .post(url)
            .header(CONTENT_TYPE, CLOUD_EVENT)
            .header(ID_HEADER, &id)
            .header(TIME_HEADER, time.to_string())
            .header(SIGNATURE_HEADER, key.sign(&id, time, &body));
        // What it answers beside the status is nobody's business here, and is not read.
        match request.body(body).send().await {
            Ok(answer) if answer.status().is_success() => {
                Attempt { taken: true, ..failed(format!("it answered {}", answer.status())) }
            }
            Ok(answer) => {
                let why = if answer.status().is_redirection() { ": redirects are not followed" } else { "" };
                // Whoever says that they are gone is asked no more.
                let fatal = answer.status() == StatusCode::GONE;
                Attempt { fatal, ..failed(format!("it answered {}{why}", answer.status())) }
            }
            Err(error) => Attempt { fatal: is_elsewhere(&error), ..failed(told(&error)) },
        }
    }

    /// Where to, and signed by what; `None` if the webhook is not there any more.
    async fn receiver(&self, delivery: &Object<Delivery>) -> Result<Option<(String, SigningSecret)>, Attempt> {
        let spec = &delivery.spec;
        let Some(hook) = &spec.webhook else { return Ok(spec.url.clone().zip(spec.secret.clone())) };
        let found = read::<Webhook>(&*self.store, delivery.metadata.project.as_ref(), hook).await;
        let failed = |message: String| Attempt { message, ..Attempt::default() };
        let owner = delivery.metadata.owner.as_ref().map(|owner| owner.uid);
        match found.map_err(|e| failed(e.to_string()))? {
            Some(found) if Some(found.metadata.uid) != owner => Ok(None),
            None => Ok(None),
            Some(found) if !found.spec.enabled => {
                Err(Attempt { fatal: true, ..failed("the webhook is disabled".to_owned()) })
            }
            Some(found) => Ok(Some((found.spec.url, found.spec.secret))),
        }
    }

    async fn signing_key(&self, delivery: &Object<Delivery>, secret: &SigningSecret) -> Result<SigningKey, String> {
        let SigningSecret { name, key } = secret;
        for store in &self.secrets {
            let found = read::<Secret>(&**store, delivery.metadata.project.as_ref(), name).await;
            let Some(found) = found.map_err(|e| e.to_string())? else { continue };
            let id = VersionId::of(&found, found.spec.version).ok_or("the secret's place is not known")?;
            let data = id.open(&**store, &*self.keys, Consistency::Stale).await.map_err(|e| e.to_string())?;
            let value = data.0.get(key).ok_or_else(|| format!("secret {name} has no key {key}"))?;
            return SigningKey::parse(value.expose()).map_err(|e| format!("secret {name}, key {key}: {e}"));
        }
        Err(format!("there is no secret {name} to sign with"))
    }
}

async fn read<K: Kind>(
    store: &dyn Store,
    project: Option<&Name>,
    name: &Name,
) -> Result<Option<Object<K>>, StoreError> {
    let key = key::object(kind::stored(K::PLURAL).expect("every kind is listed"), project, name);
    let row = store.range(RangeRequest::get(key).stale()).await?.kvs.pop();
    Ok(row.and_then(|kv| Object::<K>::from_slice(&kv.value).ok()))
}

#[cfg(test)]
#[path = "deliveries_tests.rs"]
mod tests;
