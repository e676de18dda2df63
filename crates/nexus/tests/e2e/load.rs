//! An open-loop load of idempotent GETs: requests start at a fixed rate whether earlier ones were answered or not, and
//! every one must be answered 2xx within ten seconds. A client may turn to another gateway when one does not answer,
//! as a browser does with a second address.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    answered: AtomicU64,
    slowest: Mutex<Duration>,
    failures: Mutex<Vec<String>>,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    thread: Option<std::thread::JoinHandle<()>>,
    started: Instant,
}

impl Load {
    /// Starts the load on all of these gateways in turn.
    pub fn start(gateways: impl Into<Vec<String>>, host: &str) -> Self {
        let gateways = gateways.into();
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let (stopped, counted, host) = (stop.clone(), tally.clone(), host.to_owned());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(drive(gateways, host, stopped, counted));
        });
        Self { stop, tally, thread: Some(thread), started: Instant::now() }
    }

    /// Fails with the first failures so far.
    pub fn check(&self, when: &str) {
        let failures = self.tally.failures.lock().unwrap();
        let sent = self.tally.sent.load(Ordering::Relaxed);
        assert!(
            failures.is_empty(),
            "{when}: {} of {sent} requests failed: {:#?}",
            failures.len(),
            &failures[..failures.len().min(5)]
        );
        assert!(sent > 0, "{when}: no request was sent");
    }

    /// Stops, waits for the last answers, and fails if any request failed.
    pub fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.check("at the end");
        let (sent, answered) = (self.tally.sent.load(Ordering::Relaxed), self.tally.answered.load(Ordering::Relaxed));
        let slowest = *self.tally.slowest.lock().unwrap();
        eprintln!(
            "load: {answered} of {sent} requests answered 2xx in {:?}, slowest {slowest:?}",
            self.started.elapsed()
        );
        assert_eq!(sent, answered);
    }
}

async fn drive(gateways: Vec<String>, host: String, stop: Arc<AtomicBool>, tally: Arc<Tally>) {
    let client = reqwest::Client::builder().timeout(ANSWER_WITHIN).build().unwrap();
    let mut tick = tokio::time::interval(EVERY);
    let mut running = tokio::task::JoinSet::new();
    let mut n = 0usize;
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
        n += 1;
        tally.sent.fetch_add(1, Ordering::Relaxed);
        let mut order = gateways.clone();
        order.rotate_left(n % gateways.len());
        let (client, host, tally) = (client.clone(), host.clone(), tally.clone());
        running.spawn(async move {
            let started = Instant::now();
            let outcome = tokio::time::timeout(ANSWER_WITHIN, one(&client, &order, &host)).await;
            let took = started.elapsed();
            match outcome {
                Ok(Ok(())) => {
                    tally.answered.fetch_add(1, Ordering::Relaxed);
                    let mut slowest = tally.slowest.lock().unwrap();
                    *slowest = (*slowest).max(took);
                }
                Ok(Err(why)) => tally.failures.lock().unwrap().push(format!("after {took:?}: {why}")),
                Err(_) => tally.failures.lock().unwrap().push(format!("no answer within {took:?}")),
            }
        });
        while running.try_join_next().is_some() {}
    }
    while running.join_next().await.is_some() {}
}

/// One request. Only a gateway that can't be reached is left for another: a bad answer is a failure.
async fn one(client: &reqwest::Client, gateways: &[String], host: &str) -> Result<(), String> {
    loop {
        for gateway in gateways {
            match client.get(gateway).header("host", host).send().await {
                Ok(answer) if answer.status().is_success() => {
                    return answer.bytes().await.map(|_| ()).map_err(|e| format!("the body broke off: {e}"));
                }
                Ok(answer) => {
                    let status = answer.status();
                    return Err(format!("{gateway} answered {status}: {}", answer.text().await.unwrap_or_default()));
                }
                Err(e) if e.is_connect() || e.is_request() => {}
                Err(e) => return Err(e.to_string()),
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
