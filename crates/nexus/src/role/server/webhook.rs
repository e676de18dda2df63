//! Sends the records of the audit logs to a webhook: for each group, the server that leads it POSTs batches in order, each once
//! the one before was taken. How far it has come is a row of the group, so that the next leader goes on there; a batch
//! whose answer was lost is sent again, so a receiver knows records by their index.
//!
//! The body is lines as in an export, `{"entry": …}`. Headers name the group, the first record and the signature
//! ([`nexus_audit::webhook`]). Any 2xx takes the batch; anything else is tried again, ever more seldom. What is not sent
//! stays where it is: a webhook that is down loses nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nexus_audit::webhook::{SIGNATURE_HEADER, signature};
use nexus_audit::{Hash, entry_line};
use nexus_control::audit::read;
use nexus_control::audit::retention::Position;
use nexus_env::Env;
use nexus_model::key;
use nexus_store::{RangeRequest, Store};
use tokio_util::sync::CancellationToken;

use crate::config::WebhookConfig;

/// Records and bytes of one batch.
const BATCH: usize = 200;
const MAX_BYTES: usize = 512 << 10;
/// How often a leader looks for records, and how long it waits after failures.
const LOOK: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);
/// How long the receiver may take.
const PATIENCE: Duration = Duration::from_secs(15);
const LEAST_SECRET: usize = 16;

/// Where a group's records go.
pub struct Webhook {
    url: String,
    secret: Vec<u8>,
    group: String,
    env: Env,
    store: Arc<dyn Store>,
    http: reqwest::Client,
}

/// The secret in a file that only its owner may read.
fn secret(path: &Path) -> anyhow::Result<Vec<u8>> {
    let secret = crate::secret_file::read(path)?.trim_ascii().to_vec();
    anyhow::ensure!(secret.len() >= LEAST_SECRET, "{} has fewer than {LEAST_SECRET} bytes", path.display());
    Ok(secret)
}

impl Webhook {
    pub fn new(config: &WebhookConfig, group: &str, env: &Env, store: Arc<dyn Store>) -> anyhow::Result<Self> {
        let http = super::outbound::trusted(PATIENCE)?;
        let secret = secret(&config.secret_file)?;
        Ok(Self { url: config.url.clone(), secret, group: group.to_owned(), env: env.clone(), store, http })
    }

    /// Another address begins at the first record.
    pub fn row(&self) -> String {
        format!("{}{}", key::AUDIT_WEBHOOKS, &Hash::of(self.url.as_bytes()).to_string()[..16])
    }

    /// Sends while this server leads, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            let mut wait = LOOK;
            loop {
                if self.store.leadership().borrow().is_self {
                    wait = match self.send_one().await {
                        Ok(true) => Duration::ZERO,
                        Ok(false) => LOOK,
                        Err(error) => {
                            let wait = (wait * 2).clamp(LOOK, LONGEST);
                            tracing::warn!(group = self.group, ?wait, "audit records wait for the webhook: {error:#}");
                            wait
                        }
                    };
                } else {
                    wait = LOOK;
                }
                tokio::time::sleep(wait).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Sends the next batch. False if there is none.
    async fn send_one(&self) -> anyhow::Result<bool> {
        let (position, was) = Position::read(&*self.store, &self.row()).await?;
        let size = read::state(&*self.store).await?.frontier.size();
        if position.next >= size {
            return Ok(false);
        }
        let end = size.min(position.next + BATCH as u64);
        let records = RangeRequest::new(key::audit_record(position.next), key::audit_record(end)).limit(BATCH);
        let (mut body, mut from, mut next) = (Vec::new(), None, end);
        for kv in self.store.range(records).await?.kvs {
            let index = key::audit_index(&kv.key).with_context(|| format!("{:?} is no record's key", kv.key))?;
            let line = entry_line(&kv.value);
            if !body.is_empty() && body.len() + line.len() > MAX_BYTES {
                next = index;
                break;
            }
            from.get_or_insert(index);
            body.extend(line);
            body.push(b'\n');
        }
        // Those whose time was over before this webhook was there are not sent.
        let Some(from) = from else {
            Position { next }.write(&*self.store, &self.row(), was, Vec::new()).await?;
            return Ok(true);
        };
        let time = u64::try_from(self.env.now_millis() / 1000).unwrap_or(0);
        let request = self
            .http
            .post(&self.url)
            .header("content-type", "application/x-ndjson")
            .header("nexus-audit-group", &self.group)
            .header("nexus-audit-from", from.to_string())
            .header(SIGNATURE_HEADER, signature(&self.secret, time, &body));
        let answer = request.body(body).send().await.map_err(reqwest::Error::without_url)?;
        anyhow::ensure!(answer.status().is_success(), "it answered {}", answer.status());
        Position { next }.write(&*self.store, &self.row(), was, Vec::new()).await?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nexus_audit::{Actor, ActorKind, Answer, Draft, Entry, Line, Log, Retention, webhook};
    use nexus_store::embedded::EmbeddedStore;
    use nexus_store::{Op, Txn};
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::TcpListener;

    use super::super::tests::store;
    use super::*;

    fn draft(n: u64) -> Draft {
        let (access_key, organization, session) = (None, None, None);
        Draft {
            time: n,
            actor: Actor { access_key, kind: ActorKind::Operator, name: "admin".into(), organization, session },
            action: "apps:create".into(),
            target: None,
            policies: Vec::new(),
            answer: Answer::Ok,
            revision: None,
            request_id: "req-1".parse().unwrap(),
            change: None,
            retention: Retention::Change,
            anchor: None,
            personal: None,
        }
    }

    async fn grow(store: &EmbeddedStore, log: &mut Log, by: usize) {
        for _ in 0..by {
            let appended = log.append(draft(log.size())).unwrap();
            let record = Op::put(key::audit_record(appended.index), appended.row);
            let state = Op::put(key::AUDIT_STATE, log.state().to_bytes());
            store.txn(Txn::new(Vec::new(), vec![record, state])).await.unwrap();
        }
    }

    /// Takes one request, answers it with a status, and gives its headers and its body.
    async fn take(listener: &TcpListener, status: u16) -> (BTreeMap<String, String>, Vec<u8>) {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let (mut headers, mut line) = (BTreeMap::new(), String::new());
        loop {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            match line.trim_end().split_once(": ") {
                Some((name, value)) => drop(headers.insert(name.to_lowercase(), value.to_owned())),
                None if line.trim_end().is_empty() => break,
                None => {}
            }
        }
        let mut body = vec![0; headers["content-length"].parse().unwrap()];
        stream.read_exact(&mut body).await.unwrap();
        let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        (headers, body)
    }

    #[tokio::test]
    async fn records_come_signed_in_order_and_none_is_lost_when_the_receiver_is_down() {
        let (store, mut log) = (store("local").await, Log::new("local"));
        grow(&store, &mut log, 250).await;
        let dir = tempfile::tempdir().unwrap();
        let secret_file = dir.path().join("secret");
        crate::local::state::write_private(&secret_file, b"0123456789abcdef\n").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/audit", listener.local_addr().unwrap());
        let config = WebhookConfig { url, secret_file };
        let make = || Webhook::new(&config, "local", &Env::real(), store.clone()).unwrap();

        let hook = make();
        let (sent, (headers, body)) = tokio::join!(hook.send_one(), take(&listener, 500));
        assert!(sent.unwrap_err().to_string().contains("500"));
        assert_eq!(headers["nexus-audit-from"], "0");
        let mut seen = Vec::new();
        let mut check = |headers: &BTreeMap<String, String>, body: &[u8]| {
            assert!(webhook::check(b"0123456789abcdef", &headers[SIGNATURE_HEADER], body).is_some());
            assert_eq!(headers["nexus-audit-group"], "local");
            for line in body.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                let Line::Entry(entry) = serde_json::from_slice(line).unwrap() else { panic!("no record") };
                let entry: Box<Entry> = entry;
                seen.push(entry.record.index);
            }
        };
        let (sent, (again, same)) = tokio::join!(hook.send_one(), take(&listener, 204));
        assert!(sent.unwrap());
        assert_eq!(same, body);
        check(&again, &same);
        // Another leader goes on where this one ended.
        let hook = make();
        let (sent, (headers, body)) = tokio::join!(hook.send_one(), take(&listener, 200));
        assert!(sent.unwrap());
        check(&headers, &body);
        assert!(!hook.send_one().await.unwrap(), "there is nothing more");
        grow(&store, &mut log, 3).await;
        let (sent, (headers, body)) = tokio::join!(hook.send_one(), take(&listener, 200));
        assert!(sent.unwrap());
        check(&headers, &body);
        assert_eq!(seen, (0..253).collect::<Vec<_>>());
        store.shutdown().await;
    }
}
