//! The index: ready hosts by what they are, then by what they have free.
//!
//! A *pool* holds the hosts that share everything a static filter or a bound asks about: zone, runtimes, class
//! capacities, nominal size and quarter of load. Inside a pool, a grid of [`SIDE`] x [`SIDE`] buckets keeps hosts by
//! their free fraction of cpu (row) and memory (column). Two bitmaps of the non-empty buckets, one by rows and one by
//! columns, let a search walk from the tightest fit outwards in a few word operations a step.
//!
//! A pool that runs empty keeps its storage and key until another key needs it, so the number of pools is bounded by
//! the most that were ever in use at once, and a host alone in its pool may change load without allocating.

use crate::score::UNIT;
use crate::types::{ClassId, Request, Runtimes, ZoneId};
use std::collections::{BTreeMap, BTreeSet};

/// Buckets along one side: one row is one bit of a word.
pub(crate) const SIDE: usize = 64;

/// The grain of the bucket edges: 1/1024 of a host.
const GRAIN: u32 = UNIT / 1024;
/// Runs of buckets as (count, width in grains). In a cell that packs well most hosts are nearly full, and a small
/// request must not wade through those that are too full for it, so the first buckets are the finest. The widest is
/// about 1/47 of a host.
const RUNS: [(u32, u32); 6] = [(8, 1), (4, 2), (4, 4), (4, 8), (36, 22), (8, 21)];
/// The lower edge of each bucket, and one.
const EDGES: [u32; SIDE + 1] = edges();
/// The bucket of each grain.
const STEPS: [u8; 1024] = steps();

const fn edges() -> [u32; SIDE + 1] {
    let mut edges = [0; SIDE + 1];
    let (mut run, mut at, mut grains) = (0, 0, 0);
    while run < RUNS.len() {
        let mut n = 0;
        while n < RUNS[run].0 {
            grains += RUNS[run].1;
            at += 1;
            edges[at] = grains * GRAIN;
            n += 1;
        }
        run += 1;
    }
    assert!(at == SIDE && edges[SIDE] == UNIT);
    edges
}

const fn steps() -> [u8; 1024] {
    let mut steps = [0; 1024];
    let (mut grain, mut at) = (0, 0);
    while grain < 1024 {
        while EDGES[at + 1] <= grain as u32 * GRAIN {
            at += 1;
        }
        steps[grain] = at as u8;
        grain += 1;
    }
    steps
}

/// The least fraction in a row or column, and the most.
pub(crate) fn range(step: usize) -> (u32, u32) {
    (EDGES[step], EDGES[step + 1])
}

/// A host in no pool (not ready).
pub(crate) const NO_POOL: u32 = u32::MAX;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PoolKey {
    pub(crate) zone: ZoneId,
    pub(crate) runtimes: Runtimes,
    /// Sorted, each class once, capacities above zero.
    pub(crate) classes: Vec<(ClassId, u32)>,
    pub(crate) cpu_unit: u64,
    pub(crate) memory_unit: u64,
    /// Quarter of load, 0 to 3.
    pub(crate) quarter: u8,
    /// Whether the hosts have several NUMA nodes: those are not searched here for a request that wants some of them.
    pub(crate) numa: bool,
}

/// What a search reads of a pool before it decides to look inside.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) key: PoolKey,
    pub(crate) len: u32,
    /// Rows and columns with any host.
    pub(crate) rows: u64,
    pub(crate) columns: u64,
    /// For each of `key.classes`, how many hosts have how many units free: says at once that none has enough.
    pub(crate) class_free: Vec<BTreeMap<u64, u32>>,
}

impl Head {
    /// Whether the pool's hosts could ever take the request by runtime, classes and zone.
    pub(crate) fn eligible(&self, request: &Request) -> bool {
        self.key.runtimes.has(request.runtime)
            && request.allows_zone(self.key.zone)
            && request.classes.iter().all(|(id, n)| {
                *n == 0 || self.key.classes.iter().any(|(c, units)| c == id && u64::from(*units) >= request.wants(*id))
            })
    }

    /// The most free units of a class that any host of the pool has.
    pub(crate) fn most_free(&self, class: ClassId) -> u64 {
        let at = self.key.classes.iter().position(|(c, _)| *c == class);
        at.and_then(|at| self.class_free[at].last_key_value()).map_or(0, |(free, _)| *free)
    }

    /// Whether taking a request here occupies a compute class that it has no use for.
    pub(crate) fn wastes_class(&self, request: &Request) -> bool {
        self.key.classes.iter().any(|(class, _)| request.wants(*class) == 0)
    }
}

/// The buckets of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    rows: [u64; SIDE],
    columns: [u64; SIDE],
    row_len: [u32; SIDE],
    /// Bucket to place in `lists`, plus one; 0 when empty.
    at: Box<[u16]>,
    lists: Vec<Vec<u32>>,
    spare: Vec<u16>,
}

impl Grid {
    fn new() -> Self {
        Grid {
            rows: [0; SIDE],
            columns: [0; SIDE],
            row_len: [0; SIDE],
            at: vec![0; SIDE * SIDE].into_boxed_slice(),
            lists: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Bits of the non-empty buckets of a row, by column.
    pub(crate) fn row(&self, row: usize) -> u64 {
        self.rows[row]
    }

    /// Bits of the non-empty buckets of a column, by row.
    pub(crate) fn column(&self, column: usize) -> u64 {
        self.columns[column]
    }

    pub(crate) fn row_len(&self, row: usize) -> u32 {
        self.row_len[row]
    }

    pub(crate) fn bucket(&self, row: usize, column: usize) -> &[u32] {
        match self.at[row * SIDE + column] {
            0 => &[],
            list => &self.lists[list as usize - 1],
        }
    }
}

/// Where a host stands in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pool: u32,
    pub(crate) bucket: u16,
    pub(crate) position: u32,
}

impl Place {
    pub(crate) const NOWHERE: Place = Place { pool: NO_POOL, bucket: 0, position: 0 };
}

/// The row or column of a free fraction.
pub(crate) fn step(fraction: u32) -> usize {
    STEPS[((fraction / GRAIN) as usize).min(STEPS.len() - 1)] as usize
}

pub(crate) fn bucket_of(cpu: u32, memory: u32) -> u16 {
    (step(cpu) * SIDE + step(memory)) as u16
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Pools {
    by_key: BTreeMap<PoolKey, u32>,
    pub(crate) heads: Vec<Head>,
    pub(crate) grids: Vec<Grid>,
    empty: BTreeSet<u32>,
}

impl Pools {
    /// The pool of a key, made if need be.
    pub(crate) fn intern(&mut self, key: PoolKey) -> u32 {
        if let Some(&pool) = self.by_key.get(&key) {
            return pool;
        }
        let head = Head {
            len: 0,
            rows: 0,
            columns: 0,
            class_free: vec![BTreeMap::new(); key.classes.len()],
            key: key.clone(),
        };
        let pool = match self.empty.first().copied() {
            Some(pool) => {
                self.by_key.remove(&self.heads[pool as usize].key);
                self.heads[pool as usize] = head;
                pool
            }
            None => {
                self.heads.push(head);
                self.grids.push(Grid::new());
                let pool = self.heads.len() as u32 - 1;
                self.empty.insert(pool);
                pool
            }
        };
        self.by_key.insert(key, pool);
        pool
    }

    pub(crate) fn insert(&mut self, host: u32, pool: u32, bucket: u16) -> Place {
        let head = &mut self.heads[pool as usize];
        let grid = &mut self.grids[pool as usize];
        if head.len == 0 {
            self.empty.remove(&pool);
        }
        head.len += 1;
        let (row, column) = (bucket as usize / SIDE, bucket as usize % SIDE);
        grid.row_len[row] += 1;
        let slot = &mut grid.at[bucket as usize];
        if *slot == 0 {
            *slot = match grid.spare.pop() {
                Some(list) => list,
                None => {
                    grid.lists.push(Vec::new());
                    grid.lists.len() as u16
                }
            };
            grid.rows[row] |= 1 << column;
            grid.columns[column] |= 1 << row;
            head.rows |= 1 << row;
            head.columns |= 1 << column;
        }
        let list = &mut grid.lists[*slot as usize - 1];
        list.push(host);
        Place { pool, bucket, position: list.len() as u32 - 1 }
    }

    /// Takes a host out; returns the host that moved into its position, if one did.
    pub(crate) fn remove(&mut self, place: Place) -> Option<u32> {
        let head = &mut self.heads[place.pool as usize];
        let grid = &mut self.grids[place.pool as usize];
        head.len -= 1;
        if head.len == 0 {
            self.empty.insert(place.pool);
        }
        let (row, column) = (place.bucket as usize / SIDE, place.bucket as usize % SIDE);
        grid.row_len[row] -= 1;
        let slot = grid.at[place.bucket as usize];
        let list = &mut grid.lists[slot as usize - 1];
        list.swap_remove(place.position as usize);
        let moved = list.get(place.position as usize).copied();
        if list.is_empty() {
            grid.at[place.bucket as usize] = 0;
            grid.spare.push(slot);
            grid.rows[row] &= !(1 << column);
            grid.columns[column] &= !(1 << row);
            if grid.rows[row] == 0 {
                head.rows &= !(1 << row);
            }
            if grid.columns[column] == 0 {
                head.columns &= !(1 << column);
            }
        }
        moved
    }

    /// Notes that a host of the pool went from `before` free units of its class number `index` to `after`; `None` is
    /// for a host that comes or goes.
    pub(crate) fn class_free(&mut self, pool: u32, index: usize, before: Option<u64>, after: Option<u64>) {
        let counts = &mut self.heads[pool as usize].class_free[index];
        if let Some(n) = before.and_then(|free| counts.get_mut(&free)) {
            *n -= 1;
        }
        if let Some(free) = before.filter(|free| counts.get(free) == Some(&0)) {
            counts.remove(&free);
        }
        if let Some(free) = after {
            *counts.entry(free).or_default() += 1;
        }
    }

    /// Hosts in all pools.
    pub(crate) fn len(&self) -> u32 {
        self.heads.iter().map(|head| head.len).sum()
    }
}
