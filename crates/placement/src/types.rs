//! The words of placement: ids, what a host has, what a request wants.
//!
//! Ids are small numbers interned by the caller (the region's writer owns the names). Units are fixed: cpu in
//! millicores, memory and scratch in bytes, load in thousandths.

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);
    };
}

id!(
    /// A host's handle inside one cell, given by [`crate::Cell::add_host`]. It is reused after the host's removal.
    HostId
);
id!(
    /// A failure domain with its own power and network.
    ZoneId
);
id!(
    /// Hosts that share power and a switch, inside a zone.
    RackId
);
id!(
    /// What fails as one, as an operator sees it: hosts behind one power feed or switch, in one room. Often a rack.
    FaultId
);
id!(
    /// A class of what hosts have and instances take: compute, such as one model of GPU, or storage.
    ClassId
);
id!(
    /// An image by content.
    ImageId
);
id!(
    /// A label with its value, as one.
    LabelId
);
id!(
    /// What is spread as one: an app, or a set of VMs.
    GroupId
);
id!(
    /// A part of a group that must not share a rack with the group's other parts.
    DomainId
);

/// What runs an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runtime {
    Vm,
    Container,
    Function,
}

/// The set of runtimes that a host offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Runtimes(u8);

impl Runtimes {
    /// A host that offers nothing.
    pub const NONE: Runtimes = Runtimes(0);
    /// A host that offers everything.
    pub const ALL: Runtimes = Runtimes(0b111);

    /// The set with `runtime` added.
    #[must_use]
    pub const fn with(self, runtime: Runtime) -> Self {
        Runtimes(self.0 | 1 << runtime as u8)
    }

    /// Whether `runtime` is offered.
    pub const fn has(self, runtime: Runtime) -> bool {
        self.0 & (1 << runtime as u8) != 0
    }
}

impl FromIterator<Runtime> for Runtimes {
    fn from_iter<T: IntoIterator<Item = Runtime>>(iter: T) -> Self {
        iter.into_iter().fold(Runtimes::NONE, Runtimes::with)
    }
}

/// Where a host is in its life. Only a ready host takes new instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostState {
    /// Known, not yet reporting.
    Joining,
    /// Takes instances.
    Ready,
    /// Kept from new instances by an operator; what it runs goes on.
    Cordoned,
    /// Has missed heartbeats; not yet judged.
    Suspect,
    /// Judged dead; its instances are moved.
    Dead,
}

/// What a host has to give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Millicores.
    pub cpu: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes of local disk for writable layers.
    pub scratch: u64,
    /// How many instances it may run at once, whatever their size (pids, addresses, executors).
    pub slots: u32,
}

/// As many NUMA nodes of a host are told apart.
pub const MAX_NODES: usize = 8;

/// One NUMA node: processors with the memory next to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// Millicores.
    pub cpu: u32,
    /// Bytes.
    pub memory: u64,
}

/// Some of a host's NUMA nodes, by their place in [`HostSpec::nodes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nodes(u8);

impl Nodes {
    pub const NONE: Nodes = Nodes(0);

    /// The set with node number `at` added; one that no host can have is left out.
    #[must_use]
    pub const fn with(self, at: usize) -> Self {
        if at < MAX_NODES { Nodes(self.0 | 1 << at) } else { self }
    }

    #[must_use]
    pub(crate) const fn without(self, at: usize) -> Self {
        if at < MAX_NODES { Nodes(self.0 & !(1 << at)) } else { self }
    }

    pub const fn has(self, at: usize) -> bool {
        at < MAX_NODES && self.0 >> at & 1 == 1
    }

    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The nodes' places, ascending.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAX_NODES).filter(move |at| self.has(*at))
    }
}

/// Measured load in thousandths of the host: 0 is idle, 1000 is busy. More than 1000 counts as 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load(pub u16);

/// A host as the cell learns of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSpec {
    pub zone: ZoneId,
    pub rack: RackId,
    pub fault: FaultId,
    pub state: HostState,
    pub runtimes: Runtimes,
    pub capacity: Capacity,
    /// Units of each compute class that it carries. A class named twice counts as the sum.
    pub classes: Vec<(ClassId, u32)>,
    pub images: Vec<ImageId>,
    pub load: Load,
    /// Bytes of each storage class. A class named twice counts as the sum.
    pub storage: Vec<(ClassId, u64)>,
    pub labels: Vec<LabelId>,
    /// The lowest round trip measured from a gateway, in microseconds.
    pub rtt: Option<u32>,
    /// Its NUMA nodes, which together have no more than `capacity`: 2 to [`MAX_NODES`]; those beyond are not offered. A
    /// host with none or one is a single node.
    pub nodes: Vec<Node>,
    /// Whether it can keep an instance to a node: requests that want nodes go only where that is so.
    pub pins: bool,
}

/// What changed about a host; `None` leaves a part as it is. Zone and rack never change: remove the host and add it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostUpdate {
    pub state: Option<HostState>,
    pub runtimes: Option<Runtimes>,
    pub capacity: Option<Capacity>,
    pub classes: Option<Vec<(ClassId, u32)>>,
    pub images: Option<Vec<ImageId>>,
    pub load: Option<Load>,
    pub storage: Option<Vec<(ClassId, u64)>>,
    pub labels: Option<Vec<LabelId>>,
    pub nodes: Option<Vec<Node>>,
    pub pins: Option<bool>,
    pub fault: Option<FaultId>,
}

/// Over what a group is kept even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpreadLevel {
    /// Not at all: the group packs as anything else does.
    #[default]
    None,
    /// The host with the fewest of the group first; zones don't matter.
    Host,
    /// The rack with the fewest of the group first, and in it the host with the fewest.
    Rack,
    /// The same of what fails as one.
    Fault,
    /// The zone with the fewest of the group first, and in it the host with the fewest.
    Zone,
}

impl SpreadLevel {
    /// Whether it is over what hosts have around them that no pool knows: racks, and what fails as one.
    pub(crate) fn is_about(self) -> bool {
        matches!(self, SpreadLevel::Rack | SpreadLevel::Fault)
    }
}

/// How a group is kept even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    pub level: SpreadLevel,
    /// When set, a host whose domain already holds more of the group than the emptiest eligible domain is refused
    /// (the counts differ by at most one); otherwise evenness only decides the order. A domain is eligible when it has
    /// a ready host of the right runtime, classes, zone, labels and round trip that is not excluded, so a dead zone holds
    /// nothing up, but a full one does.
    pub required: bool,
    /// The emptiest domain's count, where the caller knows of more domains than this cell has.
    pub floor: Option<u32>,
}

/// What an instance wants of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Millicores.
    pub cpu: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub scratch: u64,
    pub runtime: Runtime,
    /// Units of compute classes. A class named twice counts as the sum.
    pub classes: Vec<(ClassId, u32)>,
    /// The image that it starts from: a host that holds it starts sooner.
    pub image: Option<ImageId>,
    /// What it is spread with. The cell counts a group's reservations per zone and host.
    pub group: Option<GroupId>,
    pub spread: Spread,
    /// Members of the group outside the cell, by the rack or what else the group is spread over; sorted, each once.
    pub elsewhere: Vec<(u32, u32)>,
    /// At most this many of the group on one host.
    pub max_per_host: Option<u32>,
    /// Only in these zones.
    pub zones: Option<Vec<ZoneId>>,
    /// Not on these hosts (few: each look-up walks the list).
    pub excluded: Vec<HostId>,
    /// Bytes of a storage class.
    pub storage: Option<(ClassId, u64)>,
    /// Only on hosts that carry all of these.
    pub labels: Vec<LabelId>,
    /// Only on hosts with a measured round trip below this many microseconds.
    pub max_rtt: Option<u32>,
    /// Only on hosts that hold some of each of these groups.
    pub with: Vec<GroupId>,
    /// Not on hosts that hold any of these groups.
    pub without: Vec<GroupId>,
    /// On so many NUMA nodes of its host, an equal part (rounded up) on each; 1 is within one node. 0 is a request without a
    /// wish: it may take from any node, a part here and a part there, and counts against the host alone.
    pub span: u8,
    /// Which nodes, once chosen ([`Decision::nodes`](crate::Decision)): what is reserved and released must say it. The
    /// choice of a host does not look at it.
    pub nodes: Nodes,
    /// Not in a rack that holds members of the group of another domain.
    pub domain: Option<DomainId>,
    /// Only on the host that holds the group. The first of a group goes where more like it have room.
    pub together: bool,
}

impl Request {
    /// A request for cpu (millicores) and memory (bytes), with nothing else asked.
    pub fn new(runtime: Runtime, cpu: u32, memory: u64) -> Self {
        Request {
            cpu,
            memory,
            scratch: 0,
            runtime,
            classes: Vec::new(),
            image: None,
            group: None,
            spread: Spread::default(),
            elsewhere: Vec::new(),
            max_per_host: None,
            zones: None,
            excluded: Vec::new(),
            storage: None,
            labels: Vec::new(),
            max_rtt: None,
            with: Vec::new(),
            without: Vec::new(),
            span: 0,
            nodes: Nodes::NONE,
            domain: None,
            together: false,
        }
    }

    pub(crate) fn allows_zone(&self, zone: ZoneId) -> bool {
        self.zones.as_ref().is_none_or(|zones| zones.contains(&zone))
    }

    /// Whether it asks for anything that hosts of one pool may differ in, beside what they have free.
    pub(crate) fn is_choosy(&self) -> bool {
        !self.labels.is_empty() || self.max_rtt.is_some() || !self.with.is_empty() || !self.without.is_empty()
    }

    /// Units wanted of one class, over all mentions of it.
    pub(crate) fn wants(&self, class: ClassId) -> u64 {
        self.classes.iter().filter(|(id, _)| *id == class).map(|(_, n)| u64::from(*n)).sum()
    }
}

/// The handle names no host of this cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cell has no host {}", .0.0)]
pub struct UnknownHost(pub HostId);
