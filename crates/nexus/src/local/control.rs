//! `nexus local …`: kills, stops and cuts members of the local cloud, to see that the others carry on.
//!
//! The commands act themselves, on marks in the data folder and on processes; the supervisor, told by a signal, looks at
//! the marks again. So they work without a supervisor too.

use std::time::Duration;

use anyhow::{Context as _, bail};
use nexus_model::Name;
use nexus_network::NetnsRef;
use nix::sys::signal::Signal;
use serde::Serialize;

use super::plan::{HostPlan, Plan, RegionPlan};
use super::procs::{self, Found, SUPERVISE};
use super::state::{DataDir, Mark};
use super::{LocalArgs, LocalCommand, Output, link, materials};
use crate::exit::Fail;

/// Longer than a gateway may take to drain.
const PATIENCE: Duration = Duration::from_secs(40);

/// Who a name means.
enum Target {
    /// A server, gateway or host.
    Member { role: &'static str, name: String, host: Option<Box<HostPlan>> },
    /// All of a region.
    Region(RegionPlan),
    /// `agent@HOST` or `keeper@HOST`: its host starts it again.
    Daemon { role: &'static str, host: String },
}

/// A member as `nexus local list` shows it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberView {
    pub name: String,
    pub role: &'static str,
    pub region: String,
    pub zone: String,
    pub address: String,
    /// `running`, `stopped` (by the user) or `down`.
    pub state: &'static str,
    pub pid: Option<i32>,
    /// The user has cut its cable.
    pub cut: bool,
    /// The user has cut its region off from the others.
    pub region_cut: bool,
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
    let view = |role: &'static str, name: &str, place: (&Name, &Name), address: String| {
        let pid = running.iter().find(|f| is_member(dir, f, role, name)).map(|f| f.process.pid());
        let state = match pid {
            Some(_) => "running",
            None if dir.is_marked(name, Mark::Stopped) => "stopped",
            None => "down",
        };
        let (region, zone) = (place.0.to_string(), place.1.to_string());
        let (cut, region_cut) = (dir.is_marked(name, Mark::Cut), dir.is_marked(&region, Mark::Cut));
        MemberView { name: name.to_owned(), role, region, zone, address, state, pid, cut, region_cut }
    };
    let servers = plan.servers();
    let (hosts, gateways) = (plan.hosts(), plan.gateways());
    let mut all = Vec::new();
    all.extend(servers.iter().map(|s| view("server", s.name.as_str(), (&s.region, &s.zone), s.api_tls.to_string())));
    all.extend(hosts.iter().map(|h| view("host", h.name.as_str(), (&h.region, &h.zone), h.address6.to_string())));
    all.extend(gateways.iter().map(|g| view("gateway", g.name.as_str(), (&g.region, &g.zone), g.http.to_string())));
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
    let width = members.iter().map(|m| m.name.len()).max().unwrap_or(0).max(12);
    println!("{:<width$} {:<8} {:<8} {:<10} {:<8} ADDRESS", "NAME", "ROLE", "ZONE", "STATE", "PID");
    for m in members {
        let state = match (m.cut, m.region_cut) {
            (true, _) => format!("{},cut", m.state),
            (false, true) => format!("{},region cut", m.state),
            (false, false) => m.state.to_owned(),
        };
        let pid = m.pid.map_or("-".to_owned(), |p| p.to_string());
        println!("{:<width$} {:<8} {:<8} {state:<10} {pid:<8} {}", m.name, m.role, m.zone, m.address);
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
    if let Some(region) = plan.region(name) {
        return Ok(Target::Region(region.clone()));
    }
    let member =
        |role, host: Option<HostPlan>| Ok(Target::Member { role, name: name.to_owned(), host: host.map(Box::new) });
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
    let regions: Vec<&str> = plan.regions.iter().map(|r| r.name.as_str()).collect();
    Fail::not_found(format!(
        "the local cloud has no {name:?}; it has {names}, agent@HOST and keeper@HOST, and all of {}",
        regions.join(", ")
    ))
    .into()
}

/// The process that a target is now.
fn process(dir: &DataDir, target: &Target) -> anyhow::Result<Option<procs::Process>> {
    let fits = |f: &Found| match target {
        Target::Member { role, name, .. } => is_member(dir, f, role, name),
        Target::Daemon { role, host } => {
            let [_, agent, keeper] = materials::host_config_paths(dir, host);
            f.role == *role && f.path == if *role == "agent" { agent } else { keeper }
        }
        Target::Region(_) => false,
    };
    let running = procs::find(dir.root()).context("looking for running members")?;
    Ok(running.into_iter().find(fits).map(|f| f.process))
}

fn end(dir: &DataDir, plan: &Plan, name: &str, signal: Signal, stays_down: bool) -> anyhow::Result<()> {
    let target = target(plan, name)?;
    if let Target::Region(region) = &target {
        return end_region(dir, plan, region, signal, stays_down);
    }
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

/// Ends all of a region at once: whoever is left must not see the others go one by one.
fn end_region(dir: &DataDir, plan: &Plan, region: &RegionPlan, signal: Signal, stays_down: bool) -> anyhow::Result<()> {
    let names = plan.members_of(region);
    if stays_down {
        for name in &names {
            dir.mark(name.as_str(), Mark::Stopped)?;
        }
    }
    let running = procs::find(dir.root()).context("looking for running members")?;
    let is_its = |f: &&Found| {
        names.iter().any(|n| ["server", "gateway", "host"].iter().any(|role| is_member(dir, f, role, n.as_str())))
    };
    let ending: Vec<&Found> = running.iter().filter(is_its).collect();
    for member in &ending {
        member.process.signal(signal).with_context(|| format!("signalling a {}", member.role))?;
    }
    for member in ending {
        if !member.process.wait(PATIENCE).context("waiting")? {
            member.process.signal(Signal::SIGKILL).with_context(|| format!("killing a {}", member.role))?;
            if !member.process.wait(PATIENCE).context("waiting")? {
                bail!("a {} of {} (pid {}) does not end", member.role, region.name, member.process.pid());
            }
        }
    }
    poke(dir)
}

/// Ends all of a region that is to leave, for good.
pub fn retire(dir: &DataDir, plan: &Plan, region: &RegionPlan) -> anyhow::Result<()> {
    end_region(dir, plan, region, Signal::SIGTERM, true)
}

fn restart(dir: &DataDir, plan: &Plan, name: &str) -> anyhow::Result<()> {
    match target(plan, name)? {
        Target::Member { name, .. } => dir.unmark(&name, Mark::Stopped)?,
        Target::Region(region) => {
            for name in plan.members_of(&region) {
                dir.unmark(name.as_str(), Mark::Stopped)?;
            }
        }
        Target::Daemon { .. } => {}
    }
    end(dir, plan, name, Signal::SIGTERM, false)
}

fn start(dir: &DataDir, plan: &Plan, name: &str) -> anyhow::Result<()> {
    match target(plan, name)? {
        Target::Member { name, .. } => dir.unmark(&name, Mark::Stopped)?,
        Target::Region(region) => {
            for name in plan.members_of(&region) {
                dir.unmark(name.as_str(), Mark::Stopped)?;
            }
        }
        Target::Daemon { host, .. } => bail!("{name} is started by its host; `nexus local start {host}` starts that"),
    }
    if !has_supervisor(dir)? {
        return Err(Fail::conflict("the local cloud does not run: `nexus up` starts all of it").into());
    }
    poke(dir)
}

/// Tells the supervisor to look at the plan and the marks again.
pub fn poke(dir: &DataDir) -> anyhow::Result<()> {
    for found in procs::find(dir.root()).context("looking for the supervisor")? {
        if found.role == SUPERVISE {
            found.process.signal(Signal::SIGUSR1).context("telling the supervisor")?;
        }
    }
    Ok(())
}

fn cable(dir: &DataDir, plan: &Plan, name: &str, cut: bool) -> anyhow::Result<()> {
    let target = target(plan, name)?;
    if let Target::Region(region) = &target {
        return region_cable(dir, plan, region, cut);
    }
    let Target::Member { host: Some(host), name, .. } = &target else {
        return Err(Fail::usage(format!("{name} is neither a host nor a region: only those have a cable")).into());
    };
    if cut {
        dir.mark(name, Mark::Cut)?;
    } else {
        dir.unmark(name, Mark::Cut)?;
    }
    // A host that does not run finds the mark when it starts.
    let Some(process) = process(dir, &target)? else { return Ok(()) };
    let region = plan.region(host.region.as_str()).context("a host is in a region of the plan")?;
    let netns = if plan.apart {
        // With no server and no gateway, only the supervisor knows the region's namespace.
        let Some(inhabitant) = super::inhabitant(dir, plan, region)? else { return poke(dir) };
        NetnsRef::Pid(inhabitant.pid().cast_unsigned())
    } else {
        NetnsRef::Own
    };
    let underlay = link::underlay(plan, region, netns)?;
    super::small_runtime()?.block_on(async {
        if cut { underlay.cut(name).await } else { underlay.heal(&link::host_link(host, process.pid())).await }
    })?;
    Ok(())
}

fn region_cable(dir: &DataDir, plan: &Plan, region: &RegionPlan, cut: bool) -> anyhow::Result<()> {
    if !plan.apart {
        return Err(Fail::usage(format!(
            "{} is the only region: there is nothing to cut it off from. `nexus up --regions 3` makes several",
            region.name
        ))
        .into());
    }
    let name = region.name.as_str();
    if cut {
        dir.mark(name, Mark::Cut)?;
    } else {
        dir.unmark(name, Mark::Cut)?;
    }
    // Without a supervisor nothing runs that has a cable; the next one finds the mark.
    if !has_supervisor(dir)? {
        return Ok(());
    }
    let backbone = link::backbone(plan)?;
    super::small_runtime()?
        .block_on(async { if cut { backbone.cut(name).await } else { backbone.heal(name).await } })
        .with_context(|| format!("the cable of {name}"))
}
