//! Keeps a local cloud running: starts every member, and starts again what ended unasked.
//!
//! One thread, one `poll`: pidfds say who ended, a signalfd brings orders (SIGUSR1: look at the marks again; SIGTERM: end,
//! leaving the members alone). A supervisor that was killed is no loss: the next one finds the members by their command
//! lines and goes on from there. Whatever it does can be done again: making groups, links and routes states what must be
//! so.
//!
//! Of several regions each has a network namespace, which lives as long as a process is in it or the supervisor holds it
//! open. Servers and gateways are started in their region's; their listeners on 127.0.0.1 are opened in the machine's and
//! handed over, so that users reach a region that is cut off from the others.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nexus_network::{NetnsRef, Underlay};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::backoff::Backoff;
use super::plan::{HostPlan, Plan, RegionPlan};
use super::procs::{self, Process};
use super::spawn::{Place, own_program, spawn};
use super::state::{DataDir, Mark};
use super::{cgroup, link, materials};

/// Connections to a member that wait to be accepted, as far as the kernel's own limit allows.
const BACKLOG: i32 = 4096;
/// A gateway that is down for longer than this lets go of its users' queue.
const LONGEST_HOLD: Duration = Duration::from_secs(1);

/// A process that the supervisor looks after.
struct Member {
    name: String,
    /// The number of its region.
    region: u16,
    /// What users connect to.
    listen: Vec<SocketAddr>,
    role: &'static str,
    config: PathBuf,
    host: Option<HostPlan>,
    process: Option<Process>,
    backoff: Backoff,
    /// When it is to be started, if it does not run.
    due: Instant,
}

/// Where a region's members are joined.
struct RegionNet {
    name: String,
    /// Without, in the machine's own namespace.
    netns: Option<File>,
    underlay: Underlay,
}

struct Supervisor {
    dir: DataDir,
    plan: Plan,
    program: PathBuf,
    members: Vec<Member>,
    nets: BTreeMap<u16, RegionNet>,
    /// What gateways listen on, by gateway.
    held: BTreeMap<String, Vec<TcpListener>>,
    runtime: tokio::runtime::Runtime,
}

/// Runs until told to stop. Refuses when another supervisor has the folder.
pub fn run(dir: DataDir) -> anyhow::Result<()> {
    let Some(_lock) = dir.try_lock()? else { bail!("{} has a supervisor already", dir.root().display()) };
    let plan = dir.plan()?.with_context(|| format!("{} holds no cloud", dir.root().display()))?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1] {
        signals.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    let orders =
        SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("making a signalfd")?;
    let runtime = super::small_runtime()?;
    let members = members(&dir, &plan);
    let nets = BTreeMap::new();
    let mut supervisor =
        Supervisor { program: own_program()?, dir, plan, members, nets, held: BTreeMap::new(), runtime };
    supervisor.join_regions()?;
    supervisor.adopt()?;
    eprintln!("supervising {} with {} members", supervisor.plan.cluster_id, supervisor.members.len());
    supervisor.supervise(&orders)
}

/// Everything that is to run, in the order in which it starts.
fn members(dir: &DataDir, plan: &Plan) -> Vec<Member> {
    let now = Instant::now();
    let member = |name: &str, role, region: &RegionPlan, config| Member {
        name: name.to_owned(),
        region: region.index,
        listen: Vec::new(),
        role,
        config,
        host: None,
        process: None,
        backoff: Backoff::default(),
        due: now,
    };
    let mut all = Vec::new();
    for region in &plan.regions {
        all.extend(plan.servers_of(region).into_iter().map(|s| Member {
            listen: vec![s.api_tls, s.api_http],
            ..member(s.name.as_str(), "server", region, dir.config(s.name.as_str()))
        }));
    }
    for region in &plan.regions {
        all.extend(plan.hosts_of(region).into_iter().map(|h| {
            let [config, ..] = materials::host_config_paths(dir, h.name.as_str());
            Member { host: Some(h.clone()), ..member(h.name.as_str(), "host-init", region, config) }
        }));
        all.extend(plan.gateways_of(region).into_iter().map(|g| Member {
            listen: vec![g.http, g.admin],
            ..member(g.name.as_str(), "gateway", region, dir.config(g.name.as_str()))
        }));
    }
    all
}

/// Opens what users connect to, in the machine's namespace.
fn open_listeners(member: &Member) -> anyhow::Result<Vec<TcpListener>> {
    let open = |address: &SocketAddr| -> std::io::Result<TcpListener> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(*address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        // A gateway may start before the one before it has drained.
        socket.set_reuse_port(member.role == "gateway")?;
        socket.bind(&(*address).into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    member.listen.iter().map(|a| open(a).with_context(|| format!("listening at {a}"))).collect()
}

impl Supervisor {
    /// Makes the wires of every region of the plan, and between them.
    fn join_regions(&mut self) -> anyhow::Result<()> {
        let plan = self.plan.clone();
        for region in &plan.regions {
            if self.nets.contains_key(&region.index) {
                continue;
            }
            let netns = if plan.apart { Some(self.namespace_of(region)?) } else { None };
            let underlay = link::underlay(&plan, region, reference(netns.as_ref()))?;
            self.runtime.block_on(underlay.create()).context("making the underlay")?;
            self.nets.insert(region.index, RegionNet { name: region.name.to_string(), netns, underlay });
        }
        if !plan.apart {
            return Ok(());
        }
        let backbone = link::backbone(&plan)?;
        let kept = |index: &u16| plan.regions.iter().any(|r| r.index == *index);
        let gone: Vec<u16> = self.nets.keys().copied().filter(|i| !kept(i)).collect();
        let gone: Vec<RegionNet> = gone.iter().filter_map(|i| self.nets.remove(i)).collect();
        self.runtime
            .block_on(async {
                backbone.create().await?;
                for region in gone {
                    backbone.detach(&region.name).await?;
                }
                for region in &plan.regions {
                    let netns = reference(self.nets[&region.index].netns.as_ref());
                    backbone.attach(&link::region_link(&plan, region, netns)).await?;
                    if self.dir.is_marked(region.name.as_str(), Mark::Cut) {
                        backbone.cut(region.name.as_str()).await?;
                    }
                }
                anyhow::Ok(())
            })
            .context("making the wire between the regions")
    }

    /// The namespace in which a region's servers and gateways run already, or else a new one.
    fn namespace_of(&self, region: &RegionPlan) -> anyhow::Result<File> {
        if let Some(process) = super::inhabitant(&self.dir, &self.plan, region)? {
            let path = format!("/proc/{}/ns/net", process.pid());
            // It may end at this moment; then the region is made anew.
            if let Ok(file) = File::open(&path) {
                return Ok(file);
            }
        }
        nexus_network::new_namespace().with_context(|| format!("making a network namespace for {}", region.name))
    }

    /// Looks at the plan again: regions may have come or gone.
    fn reload(&mut self) -> anyhow::Result<()> {
        let Some(plan) = self.dir.plan()? else { return Ok(()) };
        if plan != self.plan {
            let mut members = members(&self.dir, &plan);
            for old in std::mem::take(&mut self.members) {
                if let Some(same) = members.iter_mut().find(|m| m.name == old.name) {
                    same.process = old.process;
                    same.backoff = old.backoff;
                    same.due = old.due;
                }
            }
            self.members = members;
            self.held.retain(|name, _| self.members.iter().any(|m| m.name == *name));
            self.plan = plan;
            eprintln!("the plan has changed: {} members", self.members.len());
        }
        if self.plan.apart {
            self.join_regions()?;
            for index in 0..self.members.len() {
                if let Err(e) = self.connect(index) {
                    eprintln!("connecting {}: {e:#}", self.members[index].name);
                }
            }
        }
        Ok(())
    }

    /// Takes over the members that an earlier supervisor started.
    fn adopt(&mut self) -> anyhow::Result<()> {
        for found in procs::find(self.dir.root()).context("looking for running members")? {
            let fits = |m: &&mut Member| m.role == found.role && m.config == found.path;
            let Some(member) = self.members.iter_mut().find(fits) else { continue };
            eprintln!("adopting {} (pid {})", member.name, found.process.pid());
            member.backoff.started(Instant::now());
            member.process = Some(found.process);
        }
        for index in 0..self.members.len() {
            if let Err(e) = self.connect(index) {
                eprintln!("connecting {}: {e:#}", self.members[index].name);
            }
        }
        Ok(())
    }

    fn supervise(&mut self, orders: &SignalFd) -> anyhow::Result<()> {
        loop {
            self.start_due();
            let ready = self.wait(orders)?;
            let mut stop = false;
            while let Some(order) = orders.read_signal().context("reading signals")? {
                let signal = i32::try_from(order.ssi_signo).ok().and_then(|s| Signal::try_from(s).ok());
                match signal {
                    Some(Signal::SIGUSR1) => {
                        if let Err(e) = self.reload() {
                            eprintln!("looking at the plan again: {e:#}");
                        }
                        self.start_now();
                    }
                    Some(Signal::SIGTERM | Signal::SIGINT) => stop = true,
                    _ => {}
                }
            }
            let statuses = reap();
            for index in ready {
                self.ended(index, &statuses);
            }
            if stop {
                eprintln!("told to stop; the members stay");
                return Ok(());
            }
        }
    }

    /// Waits for an order, for a member's end or for the next start; the result are the members that have ended.
    fn wait(&self, orders: &SignalFd) -> anyhow::Result<Vec<usize>> {
        let mut watched = vec![PollFd::new(orders.as_fd(), PollFlags::POLLIN)];
        let mut indices = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            if let Some(process) = &member.process {
                watched.push(PollFd::new(process.as_fd(), PollFlags::POLLIN));
                indices.push(index);
            }
        }
        let now = Instant::now();
        let waiting = self.members.iter().filter(|m| m.process.is_none() && !self.is_stopped(&m.name));
        let timeout = match waiting.map(|m| m.due.saturating_duration_since(now)).min() {
            // Rounded up: waking a moment early would spin.
            Some(left) => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for members"),
        }
        let ended = |w: &PollFd<'_>| w.revents().is_some_and(|r| !r.is_empty());
        Ok(watched[1..].iter().zip(indices).filter(|(w, _)| ended(w)).map(|(_, i)| i).collect())
    }

    fn is_stopped(&self, name: &str) -> bool {
        self.dir.is_marked(name, Mark::Stopped)
    }

    /// The user has changed something: what may run is started without further waiting.
    fn start_now(&mut self) {
        let now = Instant::now();
        for member in self.members.iter_mut().filter(|m| m.process.is_none()) {
            member.backoff = Backoff::default();
            member.due = now;
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if member.process.is_some() || member.due > now || self.is_stopped(&member.name) {
                continue;
            }
            if let Err(e) = self.start(index) {
                let now = Instant::now();
                let member = &mut self.members[index];
                let pause = member.backoff.failed(now);
                member.due = now + pause;
                eprintln!("starting {}: {e:#}; trying again in {pause:?}", member.name);
            }
        }
    }

    fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let (name, is_host) = (self.members[index].name.clone(), self.members[index].host.is_some());
        if is_host {
            cgroup::create(&self.plan.cgroup(), &name)?;
        }
        let log = self.dir.open_log(&name)?;
        let member = &self.members[index];
        let arguments = [OsStr::new(member.role), OsStr::new("--config"), member.config.as_os_str()];
        let netns = self.nets.get(&member.region).and_then(|n| n.netns.as_ref());
        // A gateway's listeners stay open here from one of its processes to the next, so that users who come in between
        // wait in their queue and are not turned away.
        let held = self.held.remove(&name);
        let listeners = match held {
            Some(held) => held,
            None if netns.is_some() || member.role == "gateway" => open_listeners(member)?,
            None => Vec::new(),
        };
        let place = match netns {
            _ if is_host => Place::NewHost,
            Some(netns) => Place::Within(netns, &listeners),
            None if listeners.is_empty() => Place::Here,
            None => Place::Holding(&listeners),
        };
        let process = spawn(&self.program, &arguments, &log, place).context("making the process")?;
        eprintln!("started {name} (pid {})", process.pid());
        let member = &mut self.members[index];
        if member.role == "gateway" {
            self.held.insert(name.clone(), listeners);
        }
        member.backoff.started(Instant::now());
        member.process = Some(process);
        // A host without its link ends by itself and is started again: nothing to undo here.
        if let Err(e) = self.connect(index) {
            eprintln!("connecting {name}: {e:#}");
        }
        Ok(())
    }

    /// Gives a running host its link, and takes it away again if the user has cut it.
    fn connect(&self, index: usize) -> anyhow::Result<()> {
        let member = &self.members[index];
        let (Some(host), Some(process)) = (&member.host, &member.process) else { return Ok(()) };
        let Some(net) = self.nets.get(&member.region) else { return Ok(()) };
        let host_link = link::host_link(host, process.pid());
        self.runtime.block_on(async {
            net.underlay.attach(&host_link).await?;
            if self.dir.is_marked(&member.name, Mark::Cut) {
                net.underlay.cut(&member.name).await?;
            }
            Ok(())
        })
    }

    fn ended(&mut self, index: usize, statuses: &BTreeMap<i32, WaitStatus>) {
        let stopped = self.is_stopped(&self.members[index].name);
        let member = &mut self.members[index];
        let Some(process) = member.process.take() else { return };
        let now = Instant::now();
        let pause = member.backoff.failed(now);
        member.due = now + pause;
        if stopped || pause > LONGEST_HOLD {
            // Nobody would take users out of the queue soon: let them see that, and turn to another gateway.
            self.held.remove(&member.name);
        }
        let how = statuses.get(&process.pid()).map_or("in a way unknown".to_owned(), |s| format!("{s:?}"));
        if stopped {
            eprintln!("{} ended ({how}) and stays down, as asked", member.name);
        } else {
            eprintln!("{} ended ({how}); it starts again in {pause:?}", member.name);
        }
    }
}

/// How this process names a namespace that it holds open.
fn reference(netns: Option<&File>) -> NetnsRef {
    netns.map_or(NetnsRef::Own, |file| NetnsRef::Path(format!("/proc/self/fd/{}", file.as_raw_fd()).into()))
}

/// Collects the ended children, so that none stays a zombie. Adopted members are not children: somebody else reaps them.
fn reap() -> BTreeMap<i32, WaitStatus> {
    let mut statuses = BTreeMap::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(_) => return statuses,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    statuses.insert(pid.as_raw(), status);
                }
            }
        }
    }
}
