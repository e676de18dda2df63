//! A made-up cell that is the same for everyone: what the promised speed of placement is measured on.
//!
//! [`Workload::new`] builds, from a seed, a heterogeneous cell: [`SHAPES`] of hosts in five zones, some with compute
//! classes, each with the runtimes, images and load that such a host has. Apps draw their size from [`flavours`] and an
//! image and spread of their own. Arrivals and departures are the jump chain of a birth-death process (what a Poisson
//! stream of arrivals with exponential lifetimes looks like when time is left out), steered so that the fuller of cpu
//! and memory moves between 70 and 90 percent of the cell. Between decisions hosts report load, fetch and evict images,
//! are cordoned and return, and change capacity.
//!
//! [`run_benchmark`] measures decisions on it; [`Strategy`] has the peers. Nothing here reads a clock: it is passed in.

mod bench;
mod strategy;

pub use bench::{BenchReport, Packing, pack_until_full, run_benchmark, run_strategy};
pub use strategy::Strategy;

use crate::types::{
    Capacity, ClassId, FaultId, GroupId, HostId, HostSpec, HostState, HostUpdate, ImageId, Load, RackId, Request,
    Runtime, Runtimes, Spread, SpreadLevel, ZoneId,
};
use crate::{Cell, Drift};
use std::collections::VecDeque;

const GI: u64 = 1 << 30;
const MI: u64 = 1 << 20;

/// Zones of the cell.
pub const ZONES: u32 = 5;
/// Images in use.
pub const IMAGES: u32 = 400;
/// The fill, in thousandths, between which the cell moves.
pub const FILL: (u32, u32) = (700, 900);

/// The two compute classes of the made-up cell.
pub const GPU_LARGE: ClassId = ClassId(0);
/// See [`GPU_LARGE`].
pub const GPU_SMALL: ClassId = ClassId(1);

/// See [`SHAPES`].
pub type Shape = (u32, u32, u64, Option<(ClassId, u32)>, bool);

/// Host shapes: share (percent), cores, memory in GiB, class and units, all runtimes or no VMs.
pub const SHAPES: [Shape; 8] = [
    (24, 32, 128, None, true),
    (20, 64, 256, None, true),
    (14, 96, 384, None, true),
    (14, 48, 96, None, false),
    (10, 32, 256, None, true),
    (8, 16, 64, None, false),
    (6, 64, 512, Some((GPU_LARGE, 8)), true),
    (4, 32, 128, Some((GPU_SMALL, 4)), true),
];

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014): enough chance for a
/// workload, the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose numbers follow from the seed alone.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (at least 1).
    pub fn below(&mut self, n: u32) -> u32 {
        (((self.next_u64() >> 32) * u64::from(n.max(1))) >> 32) as u32
    }

    /// True `n` times in a thousand.
    pub fn permille(&mut self, n: u32) -> bool {
        self.below(1000) < n
    }

    /// An index drawn by weight.
    fn weighted(&mut self, weights: impl Iterator<Item = u32> + Clone) -> usize {
        let mut left = self.below(weights.clone().sum());
        weights
            .clone()
            .take_while(|w| {
                if left < *w {
                    false
                } else {
                    left -= w;
                    true
                }
            })
            .count()
            .min(weights.count() - 1)
    }
}

/// The sizes that apps come in, with weights: 48 flavours of three runtimes.
pub fn flavours() -> Vec<(u32, Request)> {
    let mut all = Vec::new();
    let mut add = |weight, runtime, cpu, memory, scratch, class: Option<(ClassId, u32)>| {
        let classes = class.into_iter().collect();
        all.push((weight, Request { scratch, classes, ..Request::new(runtime, cpu, memory) }));
    };
    for (weight, cpu, memory) in
        [(8, 100, 64), (8, 200, 128), (6, 250, 256), (5, 500, 512), (4, 1000, 512), (2, 2000, 1024)]
    {
        add(weight, Runtime::Function, cpu, memory * MI, 0, None);
    }
    // Containers: small to large, each in three ratios of memory to cpu.
    for (weight, cpu) in [(9, 250), (9, 500), (8, 1000), (6, 2000), (4, 4000), (2, 8000), (1, 16_000)] {
        for (share, per_core) in [(1, 1), (2, 4), (1, 8)] {
            add(weight * share, Runtime::Container, cpu, u64::from(cpu) * per_core * GI / 1000, 2 * GI, None);
        }
    }
    for (weight, cores) in [(5, 1), (6, 2), (5, 4), (3, 8), (2, 16), (1, 32)] {
        for per_core in [2, 4] {
            add(weight, Runtime::Vm, cores * 1000, u64::from(cores) * per_core * GI, 20 * GI, None);
        }
    }
    for (weight, cores, memory, class, units) in [
        (2, 4, 32, GPU_LARGE, 1),
        (1, 8, 64, GPU_LARGE, 2),
        (1, 32, 256, GPU_LARGE, 4),
        (1, 60, 480, GPU_LARGE, 8),
        (3, 4, 16, GPU_SMALL, 1),
        (1, 8, 32, GPU_SMALL, 2),
        (1, 16, 64, GPU_SMALL, 4),
    ] {
        add(weight, Runtime::Container, cores * 1000, memory * GI, 50 * GI, Some((class, units)));
    }
    for (weight, cores, memory) in [(2, 4, 64), (1, 8, 128)] {
        add(weight, Runtime::Vm, cores * 1000, memory * GI, 100 * GI, None);
    }
    all
}

/// The cell, its apps, what is running, and the chance that moves them.
#[derive(Clone, Debug)]
pub struct Workload {
    pub cell: Cell,
    rng: Rng,
    /// One request per app.
    apps: Vec<Request>,
    /// What runs: host and app.
    running: Vec<(HostId, u32)>,
    cordoned: VecDeque<HostId>,
    growing: bool,
    used: (u64, u64),
    capacity: (u64, u64),
}

impl Workload {
    /// An empty cell of `hosts` hosts, and apps to fill it.
    pub fn new(seed: u64, hosts: u32) -> Self {
        let mut rng = Rng::new(seed);
        let mut cell = Cell::new();
        let mut capacity = (0, 0);
        for n in 0..hosts {
            let (_, cores, memory, class, vms) = SHAPES[rng.weighted(SHAPES.iter().map(|s| s.0))];
            let mut runtimes = Runtimes::NONE.with(Runtime::Container).with(Runtime::Function);
            if vms {
                runtimes = runtimes.with(Runtime::Vm);
            }
            // Firmware and kernel keep a little, not the same everywhere.
            let kept = u64::from(1024 + rng.below(1024)) * MI;
            let spec = HostSpec {
                zone: ZoneId(n % ZONES),
                rack: RackId(n / 40),
                fault: FaultId(n / 40),
                state: HostState::Ready,
                runtimes,
                capacity: Capacity {
                    cpu: cores * 1000,
                    memory: memory * GI - kept,
                    scratch: u64::from(cores) * 60 * GI,
                    slots: 250,
                },
                classes: class.into_iter().collect(),
                images: (0..8).map(|_| popular(&mut rng)).collect(),
                load: Load(rng.below(300) as u16),
                storage: Vec::new(),
                labels: Vec::new(),
                rtt: None,
                nodes: Vec::new(),
                pins: true,
            };
            capacity.0 += u64::from(spec.capacity.cpu);
            capacity.1 += spec.capacity.memory;
            cell.add_host(spec);
        }
        let flavours = flavours();
        let apps = (0..(hosts / 5).max(60))
            .map(|n| {
                let mut request = flavours[rng.weighted(flavours.iter().map(|f| f.0))].1.clone();
                request.image = Some(popular(&mut rng));
                request.group = Some(GroupId(n));
                let (level, required) = [
                    (SpreadLevel::None, false),
                    (SpreadLevel::None, false),
                    (SpreadLevel::None, false),
                    (SpreadLevel::Host, false),
                    (SpreadLevel::Zone, false),
                    (SpreadLevel::Zone, false),
                    (SpreadLevel::Zone, true),
                ][rng.below(7) as usize];
                request.spread = Spread { level, required, floor: None };
                if rng.permille(50) {
                    request.max_per_host = Some(1 + rng.below(3));
                }
                if rng.permille(100) {
                    request.zones = Some((0..2).map(|_| ZoneId(rng.below(ZONES))).collect());
                }
                request
            })
            .collect();
        Workload {
            cell,
            rng,
            apps,
            running: Vec::new(),
            cordoned: VecDeque::new(),
            growing: true,
            used: (0, 0),
            capacity,
        }
    }

    /// The same, with apps that ask for no spread and no limit per host: spread is bought with packing, so packing is
    /// compared without it.
    pub fn without_spread(seed: u64, hosts: u32) -> Self {
        let mut workload = Workload::new(seed, hosts);
        for app in &mut workload.apps {
            app.spread = Spread::default();
            app.max_per_host = None;
        }
        workload
    }

    /// The next arrival: an app that wants one more instance.
    pub fn arrival(&mut self) -> u32 {
        self.rng.below(self.apps.len() as u32)
    }

    /// What an app's instances ask for.
    pub fn request(&self, app: u32) -> &Request {
        &self.apps[app as usize]
    }

    /// Reserves for an arrival, and has the host fetch the image. The oldest image of a host makes room for it.
    ///
    /// Panics when the host has no room: the strategy under measurement would have oversold it.
    pub fn start(&mut self, app: u32, host: HostId) {
        let request = &self.apps[app as usize];
        self.cell.reserve(host, request).expect("the strategy chose a host with room");
        self.used.0 += u64::from(request.cpu);
        self.used.1 += request.memory;
        self.running.push((host, app));
        if let Some(image) = request.image {
            self.cell.add_image(host, image).expect("the host was just reserved on");
        }
    }

    /// The fuller of cpu and memory, in thousandths of the cell.
    pub fn fill(&self) -> u32 {
        let part = |used: u64, of: u64| (u128::from(used) * 1000 / u128::from(of.max(1))) as u32;
        part(self.used.0, self.capacity.0).max(part(self.used.1, self.capacity.1))
    }

    /// What happens between two decisions: departures, heartbeats, and now and then an image, a cordon or a capacity.
    pub fn churn(&mut self) {
        let fill = self.fill();
        if fill >= FILL.1 {
            self.growing = false;
        } else if fill <= FILL.0 {
            self.growing = true;
        }
        // Departures before the next arrival are geometric: 0.8 of them on the way up, 1.25 on the way down.
        let go_on = if self.growing { 444 } else { 556 };
        while fill > FILL.0 / 2 && self.rng.permille(go_on) && self.stop() {}
        let hosts = self.cell.len() as u32;
        let load = Load(self.rng.below(700) as u16 + self.rng.below(300) as u16);
        let host = HostId(self.rng.below(hosts));
        self.cell.set_load(host, load).expect("hosts are never removed here");
        if self.rng.permille(50) {
            self.turn_over_images();
        }
        if self.rng.permille(5) {
            self.cordon(hosts);
        }
        if self.rng.permille(2) {
            self.resize(hosts);
        }
    }

    /// What runs, for an audit.
    pub fn audit(&self) -> Result<(), Drift> {
        self.cell.audit(self.running.iter().map(|(host, app)| (*host, &self.apps[*app as usize])))
    }

    /// Instances running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    fn stop(&mut self) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let at = self.rng.below(self.running.len() as u32) as usize;
        let (host, app) = self.running.swap_remove(at);
        let request = &self.apps[app as usize];
        self.used.0 -= u64::from(request.cpu);
        self.used.1 -= request.memory;
        self.cell.release(host, request).expect("what runs was reserved");
        true
    }

    fn turn_over_images(&mut self) {
        let host = HostId(self.rng.below(self.cell.len() as u32));
        let held = self.cell.snapshot(host).expect("hosts are never removed here").images;
        if held.len() > 16 {
            let evicted = held[self.rng.below(held.len() as u32) as usize];
            self.cell.remove_image(host, evicted).expect("hosts are never removed here");
        } else {
            let image = popular(&mut self.rng);
            self.cell.add_image(host, image).expect("hosts are never removed here");
        }
    }

    /// Cordons a host; the one cordoned longest returns when a hundredth of the cell is.
    fn cordon(&mut self, hosts: u32) {
        let set = |cell: &mut Cell, host, state| {
            let update = HostUpdate { state: Some(state), ..HostUpdate::default() };
            cell.update_host(host, update).expect("hosts are never removed here");
        };
        let host = HostId(self.rng.below(hosts));
        if !self.cordoned.contains(&host) {
            set(&mut self.cell, host, HostState::Cordoned);
            self.cordoned.push_back(host);
        }
        if self.cordoned.len() as u32 > hosts / 100
            && let Some(host) = self.cordoned.pop_front()
        {
            set(&mut self.cell, host, HostState::Ready);
        }
    }

    /// Gives a host one GiB of memory more or less, as a ballooning host would, never below what is reserved.
    fn resize(&mut self, hosts: u32) {
        let host = HostId(self.rng.below(hosts));
        let known = self.cell.snapshot(host).expect("hosts are never removed here");
        let mut capacity = known.capacity;
        if known.free.memory > GI && self.rng.permille(500) {
            capacity.memory -= GI;
            self.capacity.1 -= GI;
        } else {
            capacity.memory += GI;
            self.capacity.1 += GI;
        }
        let update = HostUpdate { capacity: Some(capacity), ..HostUpdate::default() };
        self.cell.update_host(host, update).expect("hosts are never removed here");
    }
}

/// An image, the low numbers far more often: half of the draws fall on a tenth of the images.
fn popular(rng: &mut Rng) -> ImageId {
    let (a, b, c) = (rng.below(IMAGES), rng.below(IMAGES), rng.below(IMAGES));
    ImageId(a.min(b).min(c) * (1 + rng.below(4)) / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_forty_flavours_and_more_and_all_differ() {
        let flavours = flavours();
        assert!(flavours.len() >= 40, "{}", flavours.len());
        for (at, (_, a)) in flavours.iter().enumerate() {
            assert!(flavours[at + 1..].iter().all(|(_, b)| a != b), "{a:?} twice");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run_and_the_books_hold() {
        let run = |seed| {
            let mut workload = Workload::new(seed, 700);
            let mut chosen = Vec::new();
            for _ in 0..6000 {
                let app = workload.arrival();
                if let Ok(decision) = workload.cell.place(workload.request(app)) {
                    workload.start(app, decision.host);
                    chosen.push(decision.host);
                }
                workload.churn();
            }
            workload.audit().unwrap();
            assert_eq!(workload.cell.oversold_hosts(), 0);
            chosen
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
