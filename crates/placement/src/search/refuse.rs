//! Why no host took a request: every host counted by the filter that turned it away.

use super::Plan;
use crate::cell::Cell;
use crate::hostset::Ones;
use crate::numa::part;
use crate::pool::{Grid, SIDE, range, step};
use crate::refusal::{Crowded, Filter, Refusal};
use crate::score::{UNIT, fraction};

impl Cell {
    /// Counts one host into a refusal.
    pub(super) fn tell(&self, plan: &Plan, host: u32, refusal: &mut Refusal) {
        let Some(filter) = self.first_failure(plan, host) else { return };
        refusal.count(filter, 1);
        let (request, hot) = (plan.request, &self.hot[host as usize]);
        match filter {
            Filter::Class => {
                let known = self.known(host);
                let free = |class| known.class_free(class);
                if let Some((class, _)) = request.classes.iter().find(|(c, _)| free(*c) < request.wants(*c)) {
                    refusal.lacking(filter, Some(*class), request.wants(*class), free(*class));
                }
            }
            Filter::Cpu => refusal.lacking(filter, None, u64::from(request.cpu), u64::from(hot.cpu)),
            Filter::Memory => refusal.lacking(filter, None, request.memory, hot.memory),
            Filter::Scratch => refusal.lacking(filter, None, request.scratch, hot.scratch),
            Filter::Storage => {
                if let Some((class, bytes)) = request.storage {
                    refusal.lacking(filter, Some(class), bytes, self.known(host).storage_free(class));
                }
            }
            Filter::Numa => {
                let seen = if self.known(host).pins {
                    Crowded::of(request.span, part(request), &self.free_by_node(host))
                } else {
                    Crowded { unpinned: 1, ..Crowded::of(request.span, part(request), &[]) }
                };
                refusal.crowd(seen);
            }
            Filter::Label => self.lacks_label(request, host).into_iter().for_each(|label| refusal.unlabelled(label, 1)),
            Filter::Latency => refusal.far(request.max_rtt.unwrap_or(0), self.known(host).rtt()),
            Filter::With | Filter::Without => {
                if let Some((filter, group)) = self.wrong_company(request, host) {
                    refusal.company(filter, group, 1);
                }
            }
            _ => {}
        }
    }

    /// Counts every host by the filter that turned it away. Whole pools, rows and buckets are counted at once where one
    /// filter must have turned away all of them, so that a full cell refuses about as fast as an open one accepts.
    pub(super) fn refuse(&self, plan: &Plan) -> Refusal {
        let request = plan.request;
        let mut refusal = Refusal::new(self.live);
        refusal.count(Filter::Ready, self.live - self.pools.len());
        for (head, grid) in self.pools.heads.iter().zip(&self.pools.grids).filter(|(head, _)| head.len > 0) {
            if !head.key.runtimes.has(request.runtime) {
                refusal.count(Filter::Runtime, head.len);
                continue;
            }
            if let Some((class, _)) = request.classes.iter().find(|(class, _)| request.wants(*class) > 0) {
                let (wanted, most) = (request.wants(*class), head.most_free(*class));
                if most < wanted {
                    refusal.count(Filter::Class, head.len);
                    refusal.lacking(Filter::Class, Some(*class), wanted, most);
                    continue;
                }
            }
            // With classes, each host's stock decides before its cpu does; hosts with classes are few.
            let by_host = request.classes.iter().any(|(c, _)| request.wants(*c) > 0);
            let too_big = |want: u64, unit: u64| want > unit;
            let row = if too_big(u64::from(request.cpu), head.key.cpu_unit) {
                SIDE
            } else {
                step(fraction(u64::from(request.cpu), head.key.cpu_unit))
            };
            let column = if too_big(request.memory, head.key.memory_unit) {
                SIDE
            } else {
                step(fraction(request.memory, head.key.memory_unit))
            };
            // From the freest row down, so that the first row short of cpu holds the most that is free.
            let mut short_seen = false;
            for at in (0..SIDE).rev().filter(|at| head.rows >> at & 1 == 1) {
                if at < row && !by_host {
                    refusal.count(Filter::Cpu, grid.row_len(at));
                    // Rounded up: no host of the row has more cpu free than this.
                    let most =
                        (u128::from(range(at).1) * u128::from(head.key.cpu_unit)).div_ceil(u128::from(UNIT)) as u64;
                    if !std::mem::replace(&mut short_seen, true)
                        && refusal.most_free(Filter::Cpu).is_none_or(|seen| seen <= most)
                    {
                        for host in Ones(grid.row(at)).flat_map(|c| grid.bucket(at, c as usize)) {
                            refusal.lacking(
                                Filter::Cpu,
                                None,
                                u64::from(request.cpu),
                                u64::from(self.hot[*host as usize].cpu),
                            );
                        }
                    }
                    continue;
                }
                self.refuse_row(plan, grid, (at, row), column, by_host, &mut refusal);
            }
        }
        refusal.finish()
    }

    /// Counts a row whose hosts may have enough cpu.
    fn refuse_row(
        &self,
        plan: &Plan,
        grid: &Grid,
        (row, first_row): (usize, usize),
        column: usize,
        by_host: bool,
        refusal: &mut Refusal,
    ) {
        let mut short_seen = false;
        for at in (0..SIDE).rev().filter(|at| grid.row(row) >> at & 1 == 1) {
            let bucket = grid.bucket(row, at);
            // Hosts past the first row have the cpu, and hosts before the column lack the memory.
            if row > first_row && at < column && !by_host {
                refusal.count(Filter::Memory, bucket.len() as u32);
                if !std::mem::replace(&mut short_seen, true) {
                    for host in bucket {
                        refusal.lacking(Filter::Memory, None, plan.request.memory, self.hot[*host as usize].memory);
                    }
                }
            } else {
                for host in bucket {
                    self.tell(plan, *host, refusal);
                }
            }
        }
    }
}
