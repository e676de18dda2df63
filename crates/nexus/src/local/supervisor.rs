//! Keeps a local cloud running: starts every member, and starts again what ended unasked.
//!
//! One thread, one `poll`: pidfds say who ended, a signalfd brings orders (SIGUSR1: look at the marks again; SIGTERM: end,
//! leaving the members alone). A supervisor that was killed is no loss: the next one finds the members by their command
//! lines and goes on from there. Whatever it does can be done again: making groups, links and routes states what must be
//! so.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use nexus_network::Underlay;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::backoff::Backoff;
use super::plan::{HostPlan, Plan};
use super::procs::{self, Process};
use super::spawn::{Place, own_program, spawn};
use super::state::{DataDir, Mark};
use super::{cgroup, link, materials};

/// A process that the supervisor looks after.
struct Member {
    name: String,
    role: &'static str,
    config: PathBuf,
    host: Option<HostPlan>,
    process: Option<Process>,
    backoff: Backoff,
    /// When it is to be started, if it does not run.
    due: Instant,
}

struct Supervisor {
    dir: DataDir,
    plan: Plan,
    program: PathBuf,
    members: Vec<Member>,
    underlay: Underlay,
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
    let underlay = link::underlay(&plan)?;
    runtime.block_on(underlay.create()).context("making the underlay")?;
    let members = members(&dir, &plan);
    let mut supervisor = Supervisor { program: own_program()?, dir, plan, members, underlay, runtime };
    supervisor.adopt()?;
    eprintln!("supervising {} with {} members", supervisor.plan.cluster_id, supervisor.members.len());
    supervisor.supervise(&orders)
}

/// Everything that is to run, in the order in which it starts.
fn members(dir: &DataDir, plan: &Plan) -> Vec<Member> {
    let now = Instant::now();
    let member = |name: &str, role, config, host| Member {
        name: name.to_owned(),
        role,
        config,
        host,
        process: None,
        backoff: Backoff::default(),
        due: now,
    };
    let servers =
        plan.servers().into_iter().map(|s| member(s.name.as_str(), "server", dir.config(s.name.as_str()), None));
    let hosts = plan.hosts().into_iter().map(|h| {
        let [config, ..] = materials::host_config_paths(dir, h.name.as_str());
        member(h.name.clone().as_str(), "host-init", config, Some(h))
    });
    let gateways =
        plan.gateways().into_iter().map(|g| member(g.name.as_str(), "gateway", dir.config(g.name.as_str()), None));
    servers.chain(hosts).chain(gateways).collect()
}

impl Supervisor {
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
                    Some(Signal::SIGUSR1) => self.start_now(),
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
        let place = if is_host { Place::NewHost } else { Place::Here };
        let process = spawn(&self.program, &arguments, &log, place).context("making the process")?;
        eprintln!("started {name} (pid {})", process.pid());
        let member = &mut self.members[index];
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
        let host_link = link::host_link(host, process.pid());
        self.runtime.block_on(async {
            self.underlay.attach(&host_link).await?;
            if self.dir.is_marked(&member.name, Mark::Cut) {
                self.underlay.cut(&member.name).await?;
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
        let how = statuses.get(&process.pid()).map_or("in a way unknown".to_owned(), |s| format!("{s:?}"));
        if stopped {
            eprintln!("{} ended ({how}) and stays down, as asked", member.name);
        } else {
            eprintln!("{} ended ({how}); it starts again in {pause:?}", member.name);
        }
    }
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
