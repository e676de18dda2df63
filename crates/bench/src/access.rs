//! Access: who asks and whether they may, as each request passes it, with an access token of a session, 100 custom policies and
//! 10,000 entities; no caller asks for the same thing twice. A whole read is measured, in one thread and without sockets, so
//! the path, the store's answer and its text are in it too. The same reads with the fleet's own key, for which neither a
//! signature nor a policy of the organization counts, say how much that is.

#[path = "../../api/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http::StatusCode;
use nexus_api::{Limits, Rate};
use nexus_iam::jwt::{self, Claims};
use serde_json::{Value, json};
use support::World;
use support::cloud::object;

use crate::policy::{APPS, ORGANIZATION, POLICIES, PROJECTS, USERS, groups_of, policy, role_of};
use crate::report::{Row, cpu_seconds, median, percentile};

const ROUNDS: usize = 5;
const READS: usize = 7_000;
const PATIENCE: Duration = Duration::from_secs(300);
const PEER: &str = "the fleet's own key";

/// Everything that decides, and the apps that are read.
async fn world() -> anyhow::Result<(World, Vec<String>)> {
    let all = Rate::new(u32::MAX, u32::MAX);
    let world = World::with(Limits { caller_rate: all, project_rate: all, ..Limits::default() });
    world.publish_key().await;
    let within = Some(ORGANIZATION);
    world.store_global("organizations", &object("Organization", ORGANIZATION, None, json!({}))).await;
    let mut members: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for n in 0..USERS {
        world.store_global("users", &object("User", &format!("u{n}"), within, json!({}))).await;
        let spec = json!({"holder": {"kind": "User", "name": format!("u{n}")}, "expires": "2090-01-01T00:00:00Z"});
        world.store_global("sessions", &object("Session", &format!("s{n}"), within, spec)).await;
        groups_of(n).into_iter().for_each(|g| members.entry(g).or_default().push(format!("u{n}")));
    }
    for (n, users) in members {
        world.store_global("groups", &object("Group", &format!("g{n}"), within, json!({"users": users}))).await;
    }
    for n in 0..PROJECTS {
        let project = format!("p{n}");
        world.store_global("projects", &object("Project", &project, None, json!({"organization": ORGANIZATION}))).await;
        let (group, role) = role_of(n);
        let subjects = json!([{"kind": "Group", "name": format!("g{group}")}]);
        let spec = json!({"role": role.to_string(), "project": project, "subjects": subjects});
        world.store_global("role-bindings", &object("RoleBinding", &project, within, spec)).await;
    }
    for n in 0..POLICIES {
        let (guard_rail, text) = policy(n);
        let spec = json!({"guardRail": guard_rail, "text": text});
        world.store_global("policies", &object("Policy", &format!("c{n}"), within, spec)).await;
    }
    let mut last = 0;
    for n in 0..APPS {
        let mut app = object("App", &format!("a{n}"), None, json!({"image": "web"}));
        app["metadata"]["project"] = Value::from(format!("p{}", n % PROJECTS));
        app["metadata"]["labels"] = json!({"team": format!("t{}", n % POLICIES), "lock": format!("l{}", n % 300)});
        last = world.store_object("apps", &app).await.max(last);
    }
    let seen = world.directory.seen(world.global.revision(), PATIENCE).await;
    anyhow::ensure!(seen && last > 0, "the directory did not come to know of it all");
    let tokens = (0..USERS).map(|n| token(&world, n)).collect::<anyhow::Result<_>>()?;
    Ok((world, tokens))
}

fn token(world: &World, user: usize) -> anyhow::Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("the clock")?.as_secs();
    let claims = Claims {
        iss: "https://cloud.test".into(),
        sub: format!("user:{ORGANIZATION}/u{user}"),
        aud: "cloudnexus".into(),
        exp: now + 900,
        nbf: now,
        iat: now,
        jti: jwt::random_id(),
        sid: format!("s{user}"),
        org: ORGANIZATION.into(),
        groups: Vec::new(),
        project: None,
        amr: vec!["pwd".into()],
        act: None,
    };
    Ok(world.signer.sign(&claims)?)
}

/// An app of a project in which the user's first group has a role: who asks and for what is never the same twice.
fn question(n: usize) -> (usize, usize) {
    let user = n * 17 % USERS;
    // 3p = g modulo the groups, and 3 × 167 is one.
    let project = groups_of(user)[0] * 167 % PROJECTS;
    (user, project + PROJECTS * (n / USERS % (APPS / PROJECTS)))
}

/// How long one read takes, in microseconds.
async fn read(world: &World, token: &str, app: usize) -> anyhow::Result<f64> {
    let path = format!("/v1/regions/local/projects/p{}/apps/a{app}", app % PROJECTS);
    let request = http::Request::get(path).header("authorization", format!("Bearer {token}"));
    let request = request.body(String::new().into())?;
    let start = Instant::now();
    let answer = world.raw(request).await;
    let took = start.elapsed().as_secs_f64() * 1e6;
    if answer.status() != StatusCode::OK {
        bail!("the figures are void: app {app} was answered with {}", answer.status());
    }
    Ok(took)
}

async fn measure() -> anyhow::Result<Vec<Row>> {
    let (world, tokens) = world().await?;
    // Each token's signature is checked once.
    let mut first = Vec::new();
    for n in 0..USERS {
        let (user, app) = question(n);
        first.push(read(&world, &tokens[user], app).await?);
    }
    let (mut p50, mut p99, mut rate, mut cpu, mut peer) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut peer_rate = Vec::new();
    for round in 0..ROUNDS {
        eprintln!("round {} of {ROUNDS}", round + 1);
        let (mut times, mut peers) = (Vec::new(), Vec::new());
        let (start, before) = (Instant::now(), cpu_seconds());
        for n in 0..READS {
            let (user, app) = question(USERS + round * READS + n);
            times.push(read(&world, &tokens[user], app).await?);
        }
        rate.push(READS as f64 / start.elapsed().as_secs_f64());
        cpu.push((cpu_seconds() - before) / READS as f64);
        let start = Instant::now();
        for n in 0..READS {
            peers.push(read(&world, &world.token, question(n).1).await?);
        }
        peer_rate.push(READS as f64 / start.elapsed().as_secs_f64());
        p50.push(percentile(&times, 0.5));
        p99.push(percentile(&times, 0.99));
        peer.push(percentile(&peers, 0.5));
    }
    world.shutdown.cancel();
    Ok(vec![
        Row::new("read with an access token p50", median(&p50), "us").peer(PEER, median(&peer)),
        Row::new("read with an access token p99", median(&p99), "us"),
        Row::new("the first one of each token p50", percentile(&first, 0.5), "us"),
        Row::new("reads", median(&rate), "1/s").peer(PEER, median(&peer_rate)).cpu_per_op(median(&cpu)),
    ])
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure())
}
