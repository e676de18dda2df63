//! `nexus local …`: kills, stops and cuts members of the local cloud, to see that the others carry on.
//!
//! The commands act themselves, on marks in the data folder and on processes; the supervisor, told by a signal, looks at
//! the marks again. So they work without a supervisor too.

use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use serde::Serialize;

use super::plan::{HostPlan, Plan};
use super::procs::{self, Found, SUPERVISE};
use super::state::{DataDir, Mark};
use super::{LocalArgs, LocalCommand, Output, link, materials};
use crate::exit::Fail;

const PATIENCE: Duration = Duration::from_secs(15);

/// Who a name means.
enum Target {
    /// A server, gateway or host.
    Member { role: &'static str, name: String, host: Option<HostPlan> },
    /// `agent@HOST` or `keeper@HOST`: its host starts it again.
    Daemon { role: &'static str, host: String },
}

/// A member as `nexus local list` shows it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberView {
    pub name: String,
    pub role: &'static str,
    pub zone: String,
    pub address: String,
    /// `running`, `stopped` (by the user) or `down`.
    pub state: &'static str,
    pub pid: Option<i32>,
    /// The user has cut its cable.
    pub cut: bool,
}

pub fn run(args: &LocalArgs) -> anyhow::Result<()> {
    let dir = super::resolve_data_dir(args.data_dir.as_deref())?;
    let Some(plan) = dir.plan()? else {
        return Err(Fail::not_found(format!("{} holds no cloud; `nexus up` makes one", dir.root().display())).into());
    };
    match &args.command {
        LocalCommand::List { output } => print_list(&list(&dir, &plan)?, *output),
        LocalCommand::Kill { name } => end(&dir, &plan, name, Signal::SIGKILL, true),
        LocalCommand::Stop { name } => end(&dir, &plan, name, Signal::SIGTERM, true),
        LocalCommand::Restart { name } => restart(&dir, &plan, name),
        LocalCommand::Start { name } => start(&dir, &plan, name),
        LocalCommand::Cut { name } => cable(&dir, &plan, name, true),
        LocalCommand::Heal { name } => cable(&dir, &plan, name, false),
    }
}

/// Every member of the cloud and whether it runs.
pub fn list(dir: &DataDir, plan: &Plan) -> anyhow::Result<Vec<MemberView>> {
    let running = procs::find(dir.root()).context("looking for running members")?;
    let view = |role: &'static str, name: &str, zone: &str, address: String| {
        let pid = running.iter().find(|f| is_member(dir, f, role, name)).map(|f| f.process.pid());
        let state = match pid {
            Some(_) => "running",
            None if dir.is_marked(name, Mark::Stopped) => "stopped",
            None => "down",
        };
        let (name, zone) = (name.to_owned(), zone.to_owned());
        MemberView { cut: dir.is_marked(&name, Mark::Cut), name, role, zone, address, state, pid }
    };
    let servers = plan.servers();
    let (hosts, gateways) = (plan.hosts(), plan.gateways());
    let mut all = Vec::new();
    all.extend(servers.iter().map(|s| view("server", s.name.as_str(), s.zone.as_str(), s.api_tls.to_string())));
    all.extend(hosts.iter().map(|h| view("host", h.name.as_str(), h.zone.as_str(), h.address6.to_string())));
    all.extend(gateways.iter().map(|g| view("gateway", g.name.as_str(), g.zone.as_str(), g.http.to_string())));
    Ok(all)
}

/// Whether the supervisor of the folder runs.
pub fn has_supervisor(dir: &DataDir) -> anyhow::Result<bool> {
    let running = procs::find(dir.root()).context("looking for the supervisor")?;
    Ok(running.iter().any(|f| f.role == SUPERVISE))
}

fn is_member(dir: &DataDir, found: &Found, role: &str, name: &str) -> bool {
    match role {
        "host" | "host-init" => found.role == "host-init" && found.path == materials::host_config_paths(dir, name)[0],
        role => found.role == role && found.path == dir.config(name),
    }
}

fn print_list(members: &[MemberView], output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(members).context("writing JSON")?);
        return Ok(());
    }
    println!("{:<12} {:<8} {:<8} {:<10} {:<8} ADDRESS", "NAME", "ROLE", "ZONE", "STATE", "PID");
    for m in members {
        let state = if m.cut { format!("{},cut", m.state) } else { m.state.to_owned() };
        let pid = m.pid.map_or("-".to_owned(), |p| p.to_string());
        println!("{:<12} {:<8} {:<8} {state:<10} {pid:<8} {}", m.name, m.role, m.zone, m.address);
    }
    Ok(())
}

fn target(plan: &Plan, name: &str) -> anyhow::Result<Target> {
    let host_of = |name: &str| plan.hosts().into_iter().find(|h| h.name.as_str() == name);
    for role in ["agent", "keeper"] {
        if let Some(host) = name.strip_prefix(role).and_then(|rest| rest.strip_prefix('@')) {
            if host_of(host).is_some() {
                return Ok(Target::Daemon { role, host: host.to_owned() });
            }
            return Err(unknown(plan, host));
        }
    }
    let member = |role, host| Ok(Target::Member { role, name: name.to_owned(), host });
    if let Some(host) = host_of(name) {
        return member("host-init", Some(host));
    }
    if plan.servers().iter().any(|s| s.name.as_str() == name) {
        return member("server", None);
    }
    if plan.gateways().iter().any(|g| g.name.as_str() == name) {
        return member("gateway", None);
    }
    Err(unknown(plan, name))
}

fn unknown(plan: &Plan, name: &str) -> anyhow::Error {
    let names = super::member_names(plan).join(", ");
    Fail::not_found(format!("the local cloud has no {name:?}; it has {names}, and agent@HOST and keeper@HOST")).into()
}

/// The process that a target is now.
fn process(dir: &DataDir, target: &Target) -> anyhow::Result<Option<procs::Process>> {
    let fits = |f: &Found| match target {
        Target::Member { role, name, .. } => is_member(dir, f, role, name),
        Target::Daemon { role, host } => {
            let [_, agent, keeper] = materials::host_config_paths(dir, host);
            f.role == *role && f.path == if *role == "agent" { agent } else { keeper }
        }
    };
    let running = procs::find(dir.root()).context("looking for running members")?;
    Ok(running.into_iter().find(fits).map(|f| f.process))
}

fn end(dir: &DataDir, plan: &Plan, name: &str, signal: Signal, stays_down: bool) -> anyhow::Result<()> {
    let target = target(plan, name)?;
    if let (Target::Member { name, .. }, true) = (&target, stays_down) {
        dir.mark(name, Mark::Stopped)?;
    }
    if let Some(process) = process(dir, &target)? {
        process.signal(signal).with_context(|| format!("signalling {name}"))?;
        if !process.wait(PATIENCE).context("waiting")? {
            process.signal(Signal::SIGKILL).with_context(|| format!("killing {name}"))?;
            if !process.wait(PATIENCE).context("waiting")? {
                bail!("{name} (pid {}) does not end", process.pid());
            }
        }
    } else if matches!(target, Target::Daemon { .. }) {
        return Err(Fail::conflict(format!("{name} does not run now")).into());
    }
    // The supervisor must not find out only when a back-off ends.
    poke(dir)
}

fn restart(dir: &DataDir, plan: &Plan, name: &str) -> anyhow::Result<()> {
    if let Target::Member { name, .. } = target(plan, name)? {
        dir.unmark(&name, Mark::Stopped)?;
    }
    end(dir, plan, name, Signal::SIGTERM, false)
}

fn start(dir: &DataDir, plan: &Plan, name: &str) -> anyhow::Result<()> {
    match target(plan, name)? {
        Target::Member { name, .. } => dir.unmark(&name, Mark::Stopped)?,
        Target::Daemon { host, .. } => bail!("{name} is started by its host; `nexus local start {host}` starts that"),
    }
    if !has_supervisor(dir)? {
        return Err(Fail::conflict("the local cloud does not run: `nexus up` starts all of it").into());
    }
    poke(dir)
}

fn poke(dir: &DataDir) -> anyhow::Result<()> {
    for found in procs::find(dir.root()).context("looking for the supervisor")? {
        if found.role == SUPERVISE {
            found.process.signal(Signal::SIGUSR1).context("telling the supervisor")?;
        }
    }
    Ok(())
}

fn cable(dir: &DataDir, plan: &Plan, name: &str, cut: bool) -> anyhow::Result<()> {
    let target = target(plan, name)?;
    let Target::Member { host: Some(host), name, .. } = &target else {
        return Err(Fail::usage(format!("{name} is not a host: only hosts have a cable")).into());
    };
    if cut {
        dir.mark(name, Mark::Cut)?;
    } else {
        dir.unmark(name, Mark::Cut)?;
    }
    // A host that does not run finds the mark when it starts.
    let Some(process) = process(dir, &target)? else { return Ok(()) };
    let underlay = link::underlay(plan)?;
    super::small_runtime()?.block_on(async {
        if cut { underlay.cut(name).await } else { underlay.heal(&link::host_link(host, process.pid())).await }
    })?;
    Ok(())
}
