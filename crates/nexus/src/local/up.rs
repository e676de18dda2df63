//! `nexus up`: makes what is missing, starts what does not run, and waits until the cloud serves.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nexus_env::{Env, RngExt as _};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use reqwest::Method;

use super::backoff::Backoff;
use super::plan::{Plan, link_prefix_of, octet_is_free};
use super::procs::{self, Process, SUPERVISE};
use super::ready::{self, Outcome};
use super::spawn::{Place, own_program, spawn};
use super::state::{DataDir, Mark};
use super::{UpArgs, down, link, materials, preflight};
use crate::client::{Client, Parts};
use crate::context::{self, Context};
use crate::exit::Fail;

const SETUP_PATIENCE: Duration = Duration::from_secs(60);

pub fn run(args: &UpArgs) -> anyhow::Result<()> {
    let dir = match &args.data_dir {
        Some(path) => DataDir::at(path)?,
        None => DataDir::at(&super::default_data_dir()?)?,
    };
    let signals = (!args.detach).then(block_signals).transpose()?;
    let first = dir.plan()?.is_none();
    let (plan, supervisor) = start(&dir, args)?;
    let context = context_of(&dir, &plan);
    let context_path = context::write(&context)?;
    let target = context::Target {
        endpoints: context.endpoints.clone(),
        ca: Some(std::fs::read_to_string(dir.ca()).context("reading the authority's certificate")?),
        token: Some(std::fs::read_to_string(dir.token()).context("reading the token")?.trim().to_owned()),
        session: None,
        region: context.region.clone(),
        project: context.project.clone(),
        organization: context.organization.clone().unwrap_or_else(context::default_organization),
    };
    let interrupted = || signals.as_ref().is_some_and(|s| next_signal(s, Duration::ZERO).is_some_and(is_end));
    let patience = Duration::from_secs(args.timeout);
    let outcome = super::small_runtime()?.block_on(ready::wait(&dir, &plan, &target, patience, interrupted))?;
    match outcome {
        Outcome::Ready => {
            report(&dir, &plan, &context_path);
            if first {
                super::small_runtime()?.block_on(invite(&target));
            }
        }
        Outcome::Interrupted => {
            eprintln!("stopping");
            return down::stop(&dir, &plan);
        }
        Outcome::Late(missing) => {
            return Err(Fail::unavailable(format!(
                "the cloud did not get ready within {} s: {missing}\nIt goes on trying; `nexus status` looks again, \
                 `nexus down` stops it.",
                args.timeout
            ))
            .into());
        }
    }
    match (signals, supervisor) {
        (Some(signals), Some(supervisor)) => stay(&dir, &plan, &signals, supervisor),
        _ => Ok(()),
    }
}

/// Prints by what the first administrator signs in, once. The token of the data folder opens everything as well, so that
/// nothing is lost when this fails.
async fn invite(target: &context::Target) {
    let invited = async {
        let client = Client::new(target)?;
        let path = "/v1/organizations/default/users/admin:invite";
        client.once::<serde_json::Value>(Method::POST, path, Parts::default()).await
    };
    match invited.await {
        Ok(invited) => {
            let (endpoint, text) = (&target.endpoints[0], |field: &str| invited[field].as_str().unwrap_or_default());
            println!("  nexus login {endpoint} --user {} --invitation {}", text("user"), text("invitation"));
            println!("                                   # as the administrator; good once, for a day");
        }
        Err(error) => eprintln!("the administrator could not be invited ({error}): `nexus user invite admin` does it"),
    }
}

/// Makes and starts everything. The result holds the supervisor if this call has started it.
fn start(dir: &DataDir, args: &UpArgs) -> anyhow::Result<(Plan, Option<Process>)> {
    let given = args.given();
    // The lock needs the folder, so what could refuse the folder comes first.
    let existing = dir.plan()?;
    if existing.is_none() {
        dir.refuse_foreign()?;
    }
    let made_folder = !dir.root().exists();
    let prepared = (|| {
        let _setup = dir.setup_lock(SETUP_PATIENCE)?;
        let existing = dir.plan()?;
        let plan = match &existing {
            Some(plan) => {
                let differences = plan.differences(&given);
                if !differences.is_empty() {
                    return Err(Fail::conflict(format!(
                        "the cloud in {} was made otherwise: {}. `nexus down --purge` removes it, or choose another \
                         --data-dir",
                        dir.root().display(),
                        differences.join("; ")
                    ))
                    .into());
                }
                let wanted = given.regions.unwrap_or(plan.regions.len());
                if wanted > plan.regions.len() {
                    plan.grown(wanted, &given.tiers).map_err(Fail::usage)?
                } else {
                    plan.clone()
                }
            }
            None => new_plan(&given.with_defaults())?,
        };
        refuse_old_stores(dir, &plan)?;
        let running = procs::find(dir.root()).context("looking for running members")?;
        preflight::check(&plan, dir.root(), &running)?;
        // Also when an earlier release wrote it, or when regions are to join.
        if !dir.holds(&plan)? {
            dir.create(&plan)?;
        }
        let program = own_program().context("finding this program's file")?;
        materials::prepare(dir, &plan, &program, materials::Machine::measure(dir.root())?)?;
        for name in super::member_names(&plan) {
            dir.unmark(&name, Mark::Stopped)?;
        }
        let supervisor = ensure_supervisor(dir, &program, &running)?;
        anyhow::Ok((plan, supervisor))
    })();
    if prepared.is_err() && made_folder && dir.plan().ok().flatten().is_none() {
        // Nothing but the lock's file is in it.
        std::fs::remove_file(dir.root().join("setup.lock")).ok();
        std::fs::remove_dir(dir.root()).ok();
    }
    prepared
}

/// Servers of a release in which a region had one group kept it right in `store`. They would refuse it one by one.
fn refuse_old_stores(dir: &DataDir, plan: &Plan) -> anyhow::Result<()> {
    let old = |name: &nexus_model::Name| dir.data(name.as_str()).join("store/FORMAT").exists();
    if !plan.servers().iter().any(|s| old(&s.name)) {
        return Ok(());
    }
    Err(Fail::conflict(format!(
        "the cloud in {} was made by an earlier release, whose metadata store this one can't read: `nexus down --purge` \
         removes it, or choose another --data-dir",
        dir.root().display()
    ))
    .into())
}

fn new_plan(choices: &super::plan::Choices) -> anyhow::Result<Plan> {
    let env = Env::real();
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let mut random: [u8; 8] = env.rng.bytes();
    while link::prefix_in_use(&link_prefix_of(random)) {
        random = env.rng.bytes();
    }
    Plan::new(choices, random, |octet| octet_is_free(&routes, octet)).map_err(|e| Fail::usage(e).into())
}

/// Starts a supervisor, or asks the one that runs to look again.
fn ensure_supervisor(dir: &DataDir, program: &Path, running: &[procs::Found]) -> anyhow::Result<Option<Process>> {
    match dir.try_lock()? {
        None => {
            for found in running.iter().filter(|f| f.role == SUPERVISE) {
                found.process.signal(Signal::SIGUSR1).context("telling the supervisor")?;
            }
            Ok(None)
        }
        // Free: nobody supervises. The new supervisor takes the lock itself; the setup lock keeps others out meanwhile.
        Some(lock) => {
            drop(lock);
            Ok(Some(start_supervisor(dir, program)?))
        }
    }
}

fn start_supervisor(dir: &DataDir, program: &Path) -> anyhow::Result<Process> {
    let log = dir.open_log("supervisor")?;
    let arguments = [OsStr::new(SUPERVISE), OsStr::new("--data-dir"), dir.root().as_os_str()];
    spawn(program, &arguments, &log, Place::Here).context("starting the supervisor")
}

fn context_of(dir: &DataDir, plan: &Plan) -> Context {
    Context {
        endpoints: plan.servers().iter().map(|s| format!("https://{}", s.api_tls)).collect(),
        ca: Some(dir.ca()),
        token_file: Some(dir.token()),
        region: plan.first_region().name.clone(),
        project: "default".parse().expect("a well-formed name"),
        organization: None,
        session_file: None,
        data_dir: Some(dir.root().to_owned()),
    }
}

/// Writes the context anew, if it is that of this cloud.
pub fn refresh_context(dir: &DataDir, plan: &Plan) -> anyhow::Result<()> {
    let Some(held) = context::read()?.filter(|c| c.data_dir.as_deref() == Some(dir.root())) else { return Ok(()) };
    let fresh = context_of(dir, plan);
    let region = if plan.region(held.region.as_str()).is_some() { held.region } else { fresh.region.clone() };
    context::write(&Context {
        region,
        project: held.project,
        organization: held.organization,
        session_file: held.session_file,
        ..fresh
    })
    .map(drop)
}

fn report(dir: &DataDir, plan: &Plan, context_path: &Path) {
    let servers = plan.servers();
    let gateways: Vec<String> = plan.gateways().iter().map(|g| format!("http://{}", g.http)).collect();
    let hosts = plan.hosts().len();
    let zones = plan.zones.len();
    if plan.apart {
        let (regions, servers) = (plan.regions.len(), servers.len());
        println!("{} is ready: {regions} regions of {zones} zones, {hosts} hosts, {servers} servers", plan.cluster_id);
        for region in &plan.regions {
            let api = plan.servers_of(region).first().map(|s| s.api_tls.to_string()).unwrap_or_default();
            let gateways: Vec<String> = plan.gateways_of(region).iter().map(|g| g.http.to_string()).collect();
            println!("  {:<9} API https://{api}, gateways {}", region.name, gateways.join(", "));
        }
        println!("  token     {}", dir.token().display());
    } else {
        println!("{} is ready: {zones} zones, {hosts} hosts, {} servers", plan.cluster_id, servers.len());
        println!("  API       https://{}", servers[0].api_tls);
        println!("  token     {}", dir.token().display());
        println!("  gateways  {}", gateways.join(", "));
    }
    println!("  context   {}", context_path.display());
    println!("Next:");
    println!("  nexus get hosts");
    println!("  nexus deploy web --image PATH    # an OCI layout or archive, a docker archive, or a .wasm component");
    if plan.apart {
        let last = plan.regions.last().map(|r| r.name.to_string()).unwrap_or_default();
        println!("  nexus deploy web --image PATH --region global    # in all regions at once");
        println!("  nexus local cut {last}         # pull a region's cable, and see the others carry on");
    } else {
        println!("  nexus local kill zone-a-1        # pull a host's plug, and see the others carry on");
    }
}

fn block_signals() -> anyhow::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    Ok(signals)
}

fn is_end(signal: Signal) -> bool {
    matches!(signal, Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP)
}

/// The next of the blocked signals that comes within `patience`.
fn next_signal(signals: &SigSet, patience: Duration) -> Option<Signal> {
    let limit = libc::timespec {
        tv_sec: patience.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    // SAFETY: the set and the limit outlive the call; no information is asked for.
    let signal = unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), &raw const limit) };
    Signal::try_from(signal).ok()
}

/// Stays in the foreground until the user or a `nexus down` ends the cloud. A supervisor that dies otherwise is replaced.
fn stay(dir: &DataDir, plan: &Plan, signals: &SigSet, mut supervisor: Process) -> anyhow::Result<()> {
    eprintln!("Ctrl-C stops the cloud; `nexus up --detach` would leave it running.");
    let program = own_program().context("finding this program's file")?;
    let mut backoff = Backoff::default();
    backoff.started(std::time::Instant::now());
    loop {
        // Looks now and then in any case: a signal may have come before this process waited.
        if next_signal(signals, Duration::from_secs(5)).is_some_and(is_end) {
            eprintln!("stopping");
            return down::stop(dir, plan);
        }
        match waitpid(Pid::from_raw(supervisor.pid()), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            Ok(WaitStatus::Exited(_, 0)) => {
                eprintln!("the cloud was stopped by another command");
                return Ok(());
            }
            _ => {
                let pause = backoff.failed(std::time::Instant::now());
                eprintln!(
                    "the supervisor died; starting another in {pause:?}. See {}",
                    dir.log("supervisor").display()
                );
                std::thread::sleep(pause);
                let _setup = dir.setup_lock(SETUP_PATIENCE)?;
                supervisor = start_supervisor(dir, &program)?;
                backoff.started(std::time::Instant::now());
            }
        }
    }
}
