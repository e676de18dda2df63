//! How instances of an older template give way to those of a newer one: pure decisions on values. [`advance`] says where a
//! rollout stands, [`goals`] how many instances of which template that asks for, [`moves`] which of them to make and stop now.
//!
//! Every instance is on one of three sides. The *target* is the template that the app is to end with: the newest, or, when that
//! has failed, the one before it. *Stable* is what served before, as long as a step still wants some of it. All *others* only go.
//!
//! What holds at every step: no ready instance is stopped for a newer template while fewer than wanted, less `maxUnavailable`, would be left; and
//! none is made beyond what the step asks for and `maxSurge`. An old instance that is not ready is stopped early only as far
//! as the new ones do not lack as much: a broken template and a moment's trouble with the old one must not end in nothing.
//!
//! What operators take away (a drained host's instances, a rebalance's) is replaced first and goes by the app's disruption budget
//! instead, on its own side and on all together: it counts what is not ready for any reason, whosoever drain that is. It goes
//! only once so many others stand, or are down for reasons of their own, as are wanted.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_model::kind::{CanaryStep, Disruption, Rollout, RolloutPhase, RolloutStatus, Severity, Strategy};
use nexus_model::{Name, Timestamp, Uid};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Target,
    Stable,
    Other,
}

/// An instance as decisions see it.
#[derive(Debug, Clone)]
pub struct Member {
    pub uid: Uid,
    pub side: Side,
    pub ready: bool,
    pub placed: bool,
    /// On a host that is being emptied: it is replaced by one of its own side.
    pub drained: bool,
    /// Its host is silent, so nobody knows whether it serves.
    pub silent: bool,
    /// It is not ready, and not because it is new: no successor that is about to be.
    pub failing: bool,
    pub zone: Option<Name>,
    pub created: Timestamp,
}

impl Member {
    /// Whether it serves, as far as anybody knows.
    fn stands(&self) -> bool {
        self.ready && !self.silent
    }
}

/// How many instances there should be now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Goals {
    pub target: usize,
    pub stable: usize,
    /// Of all sides together, with what is being replaced.
    pub most: usize,
    pub least_ready: usize,
    pub wanted: usize,
    /// Of those wanted, how many operators' work may take away.
    pub spare: usize,
}

impl Goals {
    /// How many of a side there should be.
    fn of(&self, side: Side) -> usize {
        match side {
            Side::Target => self.target,
            Side::Stable => self.stable,
            Side::Other => 0,
        }
    }

    /// With what operators' work may take away.
    pub fn allowing(self, disruption: Disruption) -> Self {
        Self { spare: self.wanted - disruption.least(self.wanted), ..self }
    }

    /// How many must stand while operators take some away: of a side, or of all.
    pub fn budget(&self, side: Option<Side>) -> usize {
        side.map_or(self.wanted, |side| self.of(side)).saturating_sub(self.spare)
    }
}

/// What to do now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moves {
    pub make_target: usize,
    pub make_stable: usize,
    pub stop: Vec<(Uid, &'static str)>,
}

/// What a decision goes by, beside the app's own words.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub wanted: usize,
    /// The newest template's.
    pub hash: String,
    pub revision: u64,
    /// Instances of the target that are not being drained, and those of them that are ready.
    pub target: usize,
    pub target_ready: usize,
    pub all: usize,
    /// Why the newest template answers too badly to go on with, if it does.
    pub errors: Option<String>,
}

/// Something that people are told.
pub type Told = (Severity, &'static str, String);

/// One step of 10 % that waits: what a canary without steps is.
const USUAL_STEPS: &[CanaryStep] = &[CanaryStep { percent: 10, seconds: None }];

fn steps(spec: &Rollout) -> &[CanaryStep] {
    if spec.steps.is_empty() { USUAL_STEPS } else { &spec.steps }
}

/// Steps of a blue/green rollout: the new set is made ready, then it serves, then the old one goes.
const SWITCHED: u32 = 1;
const LEAVING: u32 = 2;

/// The template that instances should have in the end.
pub fn target_hash(s: &RolloutStatus) -> &str {
    if s.failed { &s.stable_hash } else { &s.template_hash }
}

/// On which side an instance with a template is.
pub fn side(s: &RolloutStatus, hash: &str) -> Side {
    if hash == target_hash(s) {
        Side::Target
    } else if !s.failed && !s.stable_hash.is_empty() && hash == s.stable_hash {
        Side::Stable
    } else {
        Side::Other
    }
}

/// Whether something is there that can be gone back to.
fn has_stable(s: &RolloutStatus) -> bool {
    !s.stable_hash.is_empty() && s.stable_hash != s.template_hash
}

fn canary_goals(wanted: usize, percent: u8) -> (usize, usize) {
    let share = |percent: u8| (wanted * usize::from(percent)).div_ceil(100);
    (share(percent).max(1).min(wanted), share(100 - percent))
}

pub fn goals(spec: &Rollout, s: &RolloutStatus, wanted: usize) -> Goals {
    let unavailable = spec.max_unavailable.floor(wanted).min(wanted);
    let surge = match spec.max_surge.ceil(wanted) {
        0 if unavailable == 0 => 1,
        surge => surge,
    };
    let (mut target, mut stable) = (wanted, 0);
    if !s.failed && s.phase != RolloutPhase::Complete && has_stable(s) {
        (target, stable) = match s.strategy {
            Strategy::Rolling => (wanted, 0),
            Strategy::Canary => {
                steps(spec).get(s.step as usize).map_or((wanted, 0), |c| canary_goals(wanted, c.percent))
            }
            Strategy::BlueGreen => (wanted, if s.step < LEAVING { wanted } else { 0 }),
        };
        if let Some(held) = s.held {
            target = target.min(held as usize);
            stable = stable.max(wanted - target);
        }
    }
    Goals {
        target,
        stable,
        most: wanted.max(target + stable) + surge,
        least_ready: wanted - unavailable,
        wanted,
        spare: 0,
    }
}

/// What keeps an instance that an operator wants away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Fewer would stand than the budget wants.
    Budget { standing: usize, least: usize, of: usize },
    /// Its successor is not ready.
    Successor { standing: usize, of: usize },
    /// Its host is silent.
    Silent,
}

/// Why a ready instance on a drained host does not go now, if it doesn't. `gone`: what goes in the same step.
pub fn keeps(members: &[Member], goals: Goals, m: &Member, gone: &[(Uid, &'static str)]) -> Option<Kept> {
    if m.silent {
        return Some(Kept::Silent);
    }
    let all = || members.iter().filter(|m| !gone.iter().any(|(uid, _)| *uid == m.uid));
    let counted = [None, Some(m.side)].map(|side| {
        let of_it = move |m: &&Member| side.is_none_or(|side| m.side == side);
        let standing = all().filter(of_it).filter(|m| m.stands()).count();
        // What is down for reasons of its own has no successor yet that could be waited for.
        let down = all().filter(of_it).filter(|m| !m.drained && !m.stands() && (m.silent || m.failing)).count();
        (standing, down, goals.budget(side), side.map_or(goals.wanted, |side| goals.of(side)))
    });
    let short = counted.iter().find(|(standing, _, least, _)| standing <= least);
    if let Some((standing, _, least, of)) = short.filter(|(.., of)| *of > 0) {
        return Some(Kept::Budget { standing: *standing, least: *least, of: *of });
    }
    let early = counted.iter().find(|(standing, down, _, of)| standing + down <= *of);
    early.filter(|(.., of)| *of > 0).map(|(standing, _, _, of)| Kept::Successor { standing: *standing, of: *of })
}

/// Why an instance goes that an operator wants away.
pub const DRAINED: &str = "its host is drained";

/// Which instances to make and stop now.
pub fn moves(members: &[Member], goals: Goals) -> Moves {
    let fresh = |side: Side| members.iter().filter(move |m| m.side == side && !m.drained).count();
    // What is drained is replaced first, also where a rollout may make nothing beyond what is wanted.
    let drains = members.iter().any(|m| m.drained && m.side != Side::Other);
    let most = if drains { goals.most.max(goals.wanted.max(goals.target + goals.stable) + 1) } else { goals.most };
    let mut room = most.saturating_sub(members.len());
    let mut take = |missing: usize| {
        let made = missing.min(room);
        room -= made;
        made
    };
    // What serves is kept up before more of the new is made.
    let make_stable = take(goals.stable.saturating_sub(fresh(Side::Stable)));
    // With nothing to replace there is no surge to keep to.
    let missing = goals.target.saturating_sub(fresh(Side::Target));
    let alone = members.iter().all(|m| m.side == Side::Target && !m.drained) && goals.stable == 0;
    let make_target = if alone { missing } else { take(missing) };

    let mut stop: Vec<(Uid, &'static str)> = Vec::new();
    let ready = members.iter().filter(|m| m.ready).count();
    let mut spare_ready = ready.saturating_sub(goals.least_ready);
    let new_unready = members.iter().filter(|m| m.side == Side::Target && !m.drained && !m.ready).count();
    let mut spare_stable = members.len().saturating_sub(new_unready + goals.least_ready);
    let mut end = |m: &Member, why: &'static str, stop: &mut Vec<(Uid, &'static str)>| {
        // An old instance that is not ready may be so again before the new ones are.
        let guarded = m.side == Side::Stable && !m.ready;
        let spare = if m.ready { &mut spare_ready } else { &mut spare_stable };
        if *spare == 0 && (m.ready || guarded) {
            return;
        }
        *spare = spare.saturating_sub(1);
        stop.push((m.uid, why));
    };
    let order = |side: Side| {
        let mut all: Vec<&Member> = members.iter().filter(|m| m.side == side && !m.drained).collect();
        let mut in_zone: BTreeMap<&Name, usize> = BTreeMap::new();
        for zone in all.iter().filter_map(|m| m.zone.as_ref()) {
            *in_zone.entry(zone).or_default() += 1;
        }
        let in_zone = |m: &Member| m.zone.as_ref().map_or(0, |zone| in_zone[zone]);
        // What serves least goes first: unplaced, unready, then from the fullest zone, the youngest first.
        all.sort_by_key(|m| {
            let age = std::cmp::Reverse(m.created);
            (m.placed, m.ready, std::cmp::Reverse(in_zone(m)), age, m.uid)
        });
        all
    };
    let replaced = "replaced by a newer template";
    for m in order(Side::Other) {
        end(m, replaced, &mut stop);
    }
    for m in members.iter().filter(|m| m.side == Side::Other && m.drained) {
        end(m, replaced, &mut stop);
    }
    let stables = order(Side::Stable);
    for m in stables.iter().take(stables.len().saturating_sub(goals.stable)) {
        end(m, if goals.target > 0 { replaced } else { "scaled in" }, &mut stop);
    }
    let targets = order(Side::Target);
    for m in targets.iter().take(targets.len().saturating_sub(goals.target)) {
        end(m, "scaled in", &mut stop);
    }
    for m in members.iter().filter(|m| m.side != Side::Other && m.drained) {
        if !m.ready {
            end(m, DRAINED, &mut stop);
        } else if keeps(members, goals, m, &stop).is_none() {
            stop.push((m.uid, DRAINED));
        }
    }
    Moves { make_target, make_stable, stop }
}

/// Whether time alone asks for another look at a rollout.
pub fn is_due(spec: &Rollout, s: &RolloutStatus, now: Timestamp) -> bool {
    let over = |since: Option<Timestamp>, seconds: u32| since.is_some_and(|at| now.since(at) >= secs(seconds));
    match s.phase {
        RolloutPhase::Switched => over(s.reached, spec.keep_old_seconds),
        RolloutPhase::Progressing => {
            let bakes = (s.strategy == Strategy::Canary).then(|| steps(spec).get(s.step as usize)).flatten();
            over(s.behind_since, spec.progress_deadline_seconds)
                || bakes.and_then(|b| b.seconds).is_some_and(|seconds| over(s.reached, seconds))
        }
        _ => false,
    }
}

/// How the requests to some instances ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answers {
    pub requests: u64,
    pub errors: u64,
}

/// Why a newer template answers too badly, if it does: more of its requests end in an error than are allowed, and than of those
/// to the older one.
pub fn judge(spec: &Rollout, newer: Answers, older: Answers) -> Option<String> {
    let allowed = u64::from(spec.max_error_percent?);
    let too_many = newer.requests >= u64::from(spec.min_requests) && newer.errors * 100 > allowed * newer.requests;
    // Compared without division; nobody's requests are no errors.
    let worse = newer.errors * older.requests.max(1) > older.errors * newer.requests;
    (too_many && worse).then(|| {
        format!(
            "{} of {} requests to its instances ended in an error, {allowed} % are allowed",
            newer.errors, newer.requests
        )
    })
}

fn secs(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

/// Where a rollout stands now, and what people are told of it.
pub fn advance(spec: &Rollout, before: &RolloutStatus, seen: &Seen, now: Timestamp) -> (RolloutStatus, Vec<Told>) {
    let mut s = before.clone();
    let mut told = Vec::new();
    if s.template_hash != seen.hash {
        begin(spec, &mut s, seen, now, &mut told);
    }
    // What was gone back to is the newest again, with a new number.
    s.revision = seen.revision;
    let resumed = s.orders.resumed > s.heeded.resumed;
    let promoted = s.orders.promoted > s.heeded.promoted;
    s.heeded = s.orders;
    if s.failed && resumed {
        let message = format!("revision {} is tried again", s.revision);
        told.push((Severity::Normal, "RolloutStarted", message));
        (s.failed, s.promoted, s.step, s.reached) = (false, false, 0, None);
        s.phase = RolloutPhase::Progressing;
        (s.best_ready, s.behind_since) = (0, Some(now));
        s.traffic_percent = split_at_first(&s);
        // How many there are of it is counted anew.
        return (s, told);
    }
    if s.failed {
        if seen.target_ready >= seen.wanted && seen.all == seen.wanted && s.phase != RolloutPhase::RolledBack {
            s.phase = RolloutPhase::RolledBack;
            s.traffic_percent = None;
            s.message = s.message.replace(" is brought back", " serves again");
            told.push((Severity::Warning, "RolledBack", s.message.clone()));
        }
        return (s, told);
    }
    if s.phase == RolloutPhase::Complete {
        s.message.clear();
        return (s, told);
    }
    if let Some(why) = seen.errors.as_ref().filter(|_| has_stable(&s)) {
        fail(spec, &mut s, why, &mut told);
        return (s, told);
    }
    if s.orders.paused {
        s.phase = RolloutPhase::Paused;
        s.held.get_or_insert(u32::try_from(seen.target).unwrap_or(u32::MAX));
        (s.behind_since, s.reached) = (None, s.reached.filter(|_| is_switched(&s)));
        s.message = format!("paused with {} of {} instances new", seen.target, seen.wanted);
        return (s, told);
    }
    if s.held.take().is_some() {
        s.phase = RolloutPhase::Progressing;
        (s.best_ready, s.behind_since) = (0, Some(now));
    }
    s.promoted |= promoted;
    progress(spec, &mut s, seen, resumed, now, &mut told);
    (s, told)
}

fn is_switched(s: &RolloutStatus) -> bool {
    s.strategy == Strategy::BlueGreen && s.step >= SWITCHED
}

/// Before a step's instances are ready, none of the requests go to them but those with the header.
fn split_at_first(s: &RolloutStatus) -> Option<u8> {
    (s.strategy != Strategy::Rolling).then_some(0)
}

/// Another template than before is wanted.
fn begin(spec: &Rollout, s: &mut RolloutStatus, seen: &Seen, now: Timestamp, told: &mut Vec<Told>) {
    let first = s.template_hash.is_empty();
    let served = s.phase == RolloutPhase::Complete || is_switched(s);
    if served {
        (s.stable_hash, s.stable_revision) = (s.template_hash.clone(), s.revision);
    }
    let was_split = s.traffic_percent.is_some();
    (s.template_hash, s.revision) = (seen.hash.clone(), seen.revision);
    if !has_stable(s) {
        // The first template, or back to the one that has served all the while: nothing to try out.
        (s.stable_hash, s.stable_revision) = (String::new(), 0);
    }
    s.strategy = match spec.strategy {
        // What has served before needs no trial.
        Strategy::Canary if s.orders.undone > s.heeded.undone => Strategy::Rolling,
        strategy if has_stable(s) => strategy,
        _ => Strategy::Rolling,
    };
    s.steps = match s.strategy {
        Strategy::Rolling => 0,
        Strategy::Canary => u32::try_from(steps(spec).len()).unwrap_or(u32::MAX),
        Strategy::BlueGreen => LEAVING,
    };
    s.phase = RolloutPhase::Progressing;
    s.traffic_percent =
        if has_stable(s) && s.strategy == spec.strategy { split_at_first(s) } else { was_split.then_some(100) };
    (s.step, s.reached, s.held, s.failed, s.promoted) = (0, None, None, false, false);
    (s.started, s.best_ready, s.behind_since) = (Some(now), 0, Some(now));
    s.heeded = s.orders;
    s.message = match (first, has_stable(s)) {
        (true, _) => "the first instances are made".to_owned(),
        (_, true) => format!("{}, from revision {} to {}", s.strategy, s.stable_revision, s.revision),
        (_, false) => format!("back to revision {}", s.revision),
    };
    if !first {
        told.push((Severity::Normal, "RolloutStarted", s.message.clone()));
    }
}

/// A rollout can't go on.
fn fail(spec: &Rollout, s: &mut RolloutStatus, why: &str, told: &mut Vec<Told>) {
    if has_stable(s) && spec.auto_rollback {
        s.failed = true;
        s.phase = RolloutPhase::RollingBack;
        s.traffic_percent = s.traffic_percent.map(|_| 0);
        (s.behind_since, s.reached, s.held) = (None, None, None);
        s.message =
            format!("revision {} has failed: {why}; revision {} is brought back", s.revision, s.stable_revision);
        told.push((Severity::Warning, "RollingBack", s.message.clone()));
    } else if s.phase != RolloutPhase::Stalled {
        s.phase = RolloutPhase::Stalled;
        s.message = format!("revision {} has failed: {why}", s.revision);
        told.push((Severity::Warning, "RolloutStalled", s.message.clone()));
    }
}

/// Goes on with a rollout that nobody holds up.
fn progress(spec: &Rollout, s: &mut RolloutStatus, seen: &Seen, resumed: bool, now: Timestamp, told: &mut Vec<Told>) {
    let wanted = seen.wanted;
    let ready = u32::try_from(seen.target_ready).unwrap_or(u32::MAX);
    if seen.target_ready < goals(spec, s, wanted).target {
        s.reached = s.reached.filter(|_| is_switched(s));
        if s.behind_since.is_none() || ready > s.best_ready || (resumed && s.phase == RolloutPhase::Stalled) {
            if s.phase != RolloutPhase::Switched {
                s.phase = RolloutPhase::Progressing;
            }
            (s.best_ready, s.behind_since) = (ready, Some(now));
        }
        let deadline = secs(spec.progress_deadline_seconds);
        if s.behind_since.is_some_and(|since| now.since(since) >= deadline) && !is_switched(s) {
            let lacking = goals(spec, s, wanted).target - seen.target_ready;
            let why = format!("{lacking} of its instances did not become ready within {} s", deadline.as_secs());
            return fail(spec, s, &why, told);
        }
    } else {
        (s.behind_since, s.best_ready) = (None, ready);
    }
    let reached = s.behind_since.is_none();
    match s.strategy {
        _ if !has_stable(s) => {}
        Strategy::Canary if (s.step as usize) < steps(spec).len() => {
            canary_step(spec, s, reached, resumed, now, told);
        }
        Strategy::BlueGreen if s.step < LEAVING => {
            blue_green_step(spec, s, reached, resumed, now, told);
        }
        _ => {}
    }
    let last = match s.strategy {
        Strategy::Canary => s.step as usize >= steps(spec).len(),
        Strategy::BlueGreen => s.step >= LEAVING,
        Strategy::Rolling => true,
    };
    if !last && has_stable(s) {
        return;
    }
    if s.phase != RolloutPhase::Stalled || reached {
        s.phase = RolloutPhase::Progressing;
        s.message = format!("{} of {wanted} instances are new and ready", seen.target_ready.min(wanted));
    }
    if seen.target_ready >= wanted && seen.all == wanted {
        let replaced = has_stable(s);
        s.phase = RolloutPhase::Complete;
        (s.traffic_percent, s.reached, s.behind_since, s.promoted) = (None, None, None, false);
        (s.step, s.best_ready) = (s.steps, 0);
        s.message.clear();
        if replaced || s.revision > 1 {
            told.push((Severity::Normal, "RolloutComplete", format!("all instances are of revision {}", s.revision)));
        }
    }
}

fn canary_step(
    spec: &Rollout,
    s: &mut RolloutStatus,
    reached: bool,
    resumed: bool,
    now: Timestamp,
    told: &mut Vec<Told>,
) {
    let all = steps(spec);
    let step = all[s.step as usize];
    let (nth, percent) = (s.step + 1, step.percent);
    if s.promoted {
        s.step = u32::try_from(all.len()).unwrap_or(u32::MAX);
        (s.traffic_percent, s.reached, s.phase) = (None, None, RolloutPhase::Progressing);
        (s.best_ready, s.behind_since) = (0, Some(now));
        told.push((Severity::Normal, "Promoted", format!("revision {} takes the place of all", s.revision)));
        return;
    }
    if !reached {
        s.phase = RolloutPhase::Progressing;
        s.message = format!("step {nth} of {}: instances for {percent} % are made ready", all.len());
        return;
    }
    let since = *s.reached.get_or_insert(now);
    if s.traffic_percent != Some(percent) {
        s.traffic_percent = Some(percent);
        let message = format!("step {nth} of {}: {percent} % of the requests go to revision {}", all.len(), s.revision);
        told.push((Severity::Normal, "CanaryStep", message));
    }
    let over = match step.seconds {
        Some(seconds) => now.since(since) >= secs(seconds) || resumed,
        None => resumed,
    };
    if over {
        s.step += 1;
        (s.reached, s.phase) = (None, RolloutPhase::Progressing);
        (s.best_ready, s.behind_since) = (0, Some(now));
        if s.step as usize >= all.len() {
            s.traffic_percent = None;
        }
        return;
    }
    s.phase = if step.seconds.is_some() { RolloutPhase::Progressing } else { RolloutPhase::Waiting };
    s.message = match step.seconds {
        Some(seconds) => format!("step {nth} of {}: {percent} % of the requests, for {seconds} s", all.len()),
        None => format!("step {nth} of {}: {percent} % of the requests, until it is resumed or promoted", all.len()),
    };
}

fn blue_green_step(
    spec: &Rollout,
    s: &mut RolloutStatus,
    reached: bool,
    resumed: bool,
    now: Timestamp,
    told: &mut Vec<Told>,
) {
    if s.step == SWITCHED {
        s.phase = RolloutPhase::Switched;
        let since = *s.reached.get_or_insert(now);
        s.message = format!("revision {} serves; revision {} is kept for a while", s.revision, s.stable_revision);
        if now.since(since) >= secs(spec.keep_old_seconds) || s.promoted {
            (s.step, s.phase) = (LEAVING, RolloutPhase::Progressing);
        }
        return;
    }
    if !reached {
        s.phase = RolloutPhase::Progressing;
        s.message = format!("a whole set of revision {} is made ready", s.revision);
        return;
    }
    if !(spec.auto_promote || s.promoted || resumed) {
        s.phase = RolloutPhase::Waiting;
        s.message = format!("revision {} is ready, and serves once it is promoted", s.revision);
        return;
    }
    (s.step, s.phase, s.promoted) = (SWITCHED, RolloutPhase::Switched, false);
    (s.traffic_percent, s.reached) = (Some(100), Some(now));
    s.message = format!("revision {} serves; revision {} is kept for a while", s.revision, s.stable_revision);
    told.push((Severity::Normal, "Switched", format!("all requests go to revision {}", s.revision)));
}
