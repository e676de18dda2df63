//! A routing table made ready for look-ups. Host first (exact, then the longest `*.suffix`), then the longest path
//! prefix that ends at a `/`. A table never changes; a new one takes the state of instances over from the last.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{HeaderMap, HeaderName, HeaderValue};
use nexus_env::Endpoint;
use nexus_model::kind::Protocol;
use nexus_model::plan::{self, RoutingTable};
use nexus_model::{Name, Uid};

use crate::backend::{Backend, Lease};
use crate::balance::{Candidate, Worst, pick};
use crate::metrics::{Metrics, ServiceMetrics};
use crate::regions::{self, Refusals, Regions};

/// An instance in the light of one table.
pub(crate) struct Member {
    pub backend: Arc<Backend>,
    ready: bool,
    local: bool,
    /// Of the newer template, where requests are split.
    newer: bool,
}

/// How a service's requests are split between an older and a newer template.
pub(crate) struct Split {
    percent: u8,
    /// Requests that go to the newer one in any case. Without a value, any will do.
    header: Option<(HeaderName, Option<HeaderValue>)>,
}

impl Split {
    fn compile(split: plan::Split) -> Self {
        let header = split.header.and_then(|h| {
            let value = h.value.map(|v| HeaderValue::try_from(v).ok());
            // A value that none can have is that of no request.
            Some((h.name.parse().ok()?, if value == Some(None) { return None } else { value.flatten() }))
        });
        Self { percent: split.percent, header }
    }

    /// Whether a request is one of the newer template's. `lot`: drawn once for it, below 100.
    pub fn is_newer(&self, headers: &HeaderMap, lot: u8) -> bool {
        let asked = self.header.as_ref().is_some_and(|(name, value)| match value {
            Some(value) => headers.get_all(name).iter().any(|v| v == value),
            None => headers.contains_key(name),
        });
        asked || lot < self.percent
    }
}

pub(crate) struct Service {
    pub project: Name,
    pub app: Name,
    pub metrics: Arc<ServiceMetrics>,
    pub members: Vec<Member>,
    /// Of an app that was asleep: whom a request that waits may knock at.
    pub starting: Vec<Arc<Backend>>,
    /// Of a global app: the other regions that should run it.
    pub regions: Option<Vec<Name>>,
    pub http2: bool,
    /// A request that waits brings an instance.
    pub wakes: bool,
    pub turn: AtomicUsize,
    /// Kept from table to table, as its metrics are.
    pub refusals: Arc<Refusals>,
    pub split: Option<Split>,
}

/// The outcome of a choice.
pub(crate) enum Choice {
    Instance(Lease),
    /// All that are left have as many requests as they may.
    Busy,
    /// All have been tried, or there are none.
    Nobody,
}

impl Service {
    /// Chooses an instance that is not among `tried`, and no worse than allowed: of the template that the request is for if
    /// one of its instances is well, else of any. Better an answer of the other template than none.
    pub fn choose(&self, tried: &[Uid], max_outstanding: u32, worst: Worst, newer: Option<bool>) -> Choice {
        if newer.is_some()
            && let well @ Choice::Instance(_) = self.among(tried, max_outstanding, Worst::Well, newer)
        {
            return well;
        }
        self.among(tried, max_outstanding, worst, None)
    }

    fn among(&self, tried: &[Uid], max_outstanding: u32, worst: Worst, newer: Option<bool>) -> Choice {
        let mut busy = false;
        let candidates: Vec<Candidate> = self
            .members
            .iter()
            .map(|m| {
                let outstanding = m.backend.outstanding();
                let tried = tried.contains(&m.backend.uid) || newer.is_some_and(|newer| newer != m.newer);
                busy |= !tried && outstanding >= max_outstanding;
                Candidate {
                    ready: m.ready,
                    ejected: m.backend.health.is_ejected(),
                    local: m.local,
                    outstanding,
                    excluded: tried || outstanding >= max_outstanding,
                }
            })
            .collect();
        match pick(candidates.iter().copied(), self.turn.fetch_add(1, Ordering::Relaxed), worst) {
            Some(index) => Choice::Instance(self.members[index].backend.lease()),
            None if busy => Choice::Busy,
            None => Choice::Nobody,
        }
    }

    pub fn has_ready(&self) -> bool {
        self.members.iter().any(|m| m.ready)
    }

    /// Whether any instance but this one is ready and not ejected.
    pub fn has_other(&self, uid: Uid) -> bool {
        self.members.iter().any(|m| m.backend.uid != uid && m.ready && !m.backend.health.is_ejected())
    }
}

/// The routes of one host: the longest prefix first. A prefix has no `/` at its end, so that the root is empty.
type Paths = Vec<(String, usize)>;

#[derive(Default)]
pub(crate) struct Table {
    pub revision: u64,
    pub services: Vec<Arc<Service>>,
    pub regions: Regions,
    by_name: HashMap<String, usize>,
    exact: HashMap<String, Paths>,
    /// By suffix, without `*.`.
    wildcard: HashMap<String, Paths>,
}

/// The host of a `Host` header or authority: lower case, without port and final dot.
pub(crate) fn host_of(authority: &str) -> String {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

fn service_name(service: &plan::Service) -> String {
    format!("{}/{}:{}", service.project, service.app, service.port)
}

impl Table {
    /// Routes that name no service are left out.
    pub fn compile(table: RoutingTable, zone: &Name, before: Option<&Self>, metrics: &Metrics) -> Self {
        // Instances by uid and the service's port.
        let mut held: BTreeMap<(Uid, &str), &Arc<Backend>> = BTreeMap::new();
        let mut known: BTreeMap<&str, &Arc<Service>> = BTreeMap::new();
        for service in before.iter().flat_map(|t| &t.services) {
            known.insert(&service.metrics.name, service);
            let backends = service.members.iter().map(|m| &m.backend).chain(&service.starting);
            held.extend(backends.map(|backend| ((backend.uid, &*service.metrics.name), backend)));
        }
        let mut services = Vec::with_capacity(table.services.len());
        for service in table.services {
            let name = service_name(&service);
            let http2 = service.protocol == Protocol::H2c;
            let mut newest: BTreeMap<Uid, plan::Backend> = BTreeMap::new();
            for backend in service.backends {
                if newest.get(&backend.uid).is_none_or(|b| b.epoch < backend.epoch) {
                    newest.insert(backend.uid, backend);
                }
            }
            let backend = |b: &plan::Backend| {
                let address = Endpoint::Tcp(b.address);
                let same = |old: &&&Arc<Backend>| old.address == address && old.epoch == b.epoch && old.http2 == http2;
                match held.get(&(b.uid, &*name)).filter(same) {
                    Some(old) => (*old).clone(),
                    None => Arc::new(Backend::new(b.uid, address, b.epoch, http2)),
                }
            };
            let member = |b: plan::Backend| Member {
                backend: backend(&b),
                ready: b.ready,
                local: b.zone == *zone,
                newer: b.newer,
            };
            let members = newest.into_values().map(member).collect();
            let starting = service.starting.iter().map(backend).collect();
            let old = known.remove(&*name);
            let (global, regions) = (service.global, service.regions);
            services.push(Arc::new(Service {
                project: service.project,
                app: service.app,
                members,
                starting,
                regions: global.then_some(regions),
                http2,
                wakes: service.wakes,
                turn: AtomicUsize::new(old.map_or(0, |o| o.turn.load(Ordering::Relaxed))),
                refusals: old.map(|o| o.refusals.clone()).unwrap_or_default(),
                split: service.split.map(Split::compile),
                metrics: old.map_or_else(|| metrics.service(name), |o| o.metrics.clone()),
            }));
        }
        for gone in known.into_keys() {
            metrics.forget(gone);
        }
        let by_name = services.iter().enumerate().map(|(i, s)| (s.metrics.name.clone(), i)).collect();
        let regions = regions::compile(table.regions, before.map(|b| &b.regions), metrics);
        let mut new = Self { revision: table.revision, services, regions, by_name, ..Self::default() };
        for route in table.routes {
            let service = route.service as usize;
            if service >= new.services.len() {
                tracing::warn!(host = route.host, path = route.path, "a route names no service and is left out");
                continue;
            }
            let (map, host) = match route.host.strip_prefix("*.") {
                Some(suffix) => (&mut new.wildcard, suffix),
                None => (&mut new.exact, &*route.host),
            };
            let prefix = route.path.trim_end_matches('/').to_owned();
            let paths = map.entry(host.to_ascii_lowercase()).or_default();
            // The first of two equal routes wins.
            if paths.iter().all(|(p, _)| *p != prefix) {
                paths.push((prefix, service));
            }
        }
        for paths in new.exact.values_mut().chain(new.wildcard.values_mut()) {
            paths.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        }
        new
    }

    /// A service by its own name, as gateways name it to each other.
    pub fn named(&self, service: &str) -> Option<&Arc<Service>> {
        self.by_name.get(service).and_then(|index| self.services.get(*index))
    }

    /// The service of a request. `host` as [`host_of`] makes it.
    pub fn route(&self, host: &str, path: &str) -> Option<&Arc<Service>> {
        let find = |paths: &Paths| {
            let fits = |prefix: &str| path.strip_prefix(prefix).is_some_and(|r| r.is_empty() || r.starts_with('/'));
            // `OPTIONS *` is about the whole of a host.
            paths.iter().find(|(p, _)| fits(p) || (p.is_empty() && path == "*")).map(|(_, service)| *service)
        };
        let exact = self.exact.get(host).and_then(find);
        let index = exact.or_else(|| {
            let suffixes = host.match_indices('.').map(|(at, _)| &host[at + 1..]);
            suffixes.filter_map(|s| self.wildcard.get(s)).find_map(find)
        })?;
        self.services.get(index)
    }
}

#[cfg(test)]
mod tests {
    use nexus_model::kind::Runtime;
    use nexus_model::plan::TableRoute;

    use super::*;

    fn table(routes: &[(&str, &str)]) -> RoutingTable {
        let service = |i: usize| plan::Service {
            project: "p".parse().unwrap(),
            app: format!("app-{i}").parse().unwrap(),
            port: 80,
            protocol: Protocol::Http,
            runtime: Runtime::Container,
            backends: vec![],
            global: false,
            regions: vec![],
            wakes: false,
            starting: vec![],
            split: None,
        };
        let route = |(i, (host, path)): (usize, &(&str, &str))| TableRoute {
            host: (*host).into(),
            path: (*path).into(),
            service: i as u32,
        };
        RoutingTable {
            version: 1,
            revision: 1,
            services: (0..routes.len()).map(service).collect(),
            routes: routes.iter().enumerate().map(route).collect(),
            ..RoutingTable::default()
        }
    }

    fn compile(table: RoutingTable, before: Option<&Table>) -> Table {
        Table::compile(table, &"zone-a".parse().unwrap(), before, &Metrics::new())
    }

    #[test]
    fn hosts_and_paths_choose_the_most_specific_route() {
        let routes = [
            ("a.example", "/"),
            ("a.example", "/shop/"),
            ("a.example", "/shop/cart"),
            ("*.example", "/"),
            ("*.b.example", "/x"),
        ];
        let table = compile(table(&routes), None);
        let route = |host: &str, path: &str| {
            table.route(&host_of(host), path).map(|s| s.metrics.name.trim_start_matches("p/app-").to_owned())
        };
        let is = |host: &str, path: &str, expected: Option<&str>| {
            assert_eq!(route(host, path).as_deref(), expected, "{host} {path}");
        };
        is("a.example", "/", Some("0:80"));
        is("A.Example:8000", "/shopping", Some("0:80"));
        is("a.example.", "/shop", Some("1:80"));
        is("a.example", "/shop/x", Some("1:80"));
        is("a.example", "/shop/cart/1", Some("2:80"));
        is("b.example", "/shop", Some("3:80"));
        is("c.b.example", "/x/y", Some("4:80"));
        is("c.b.example", "/y", Some("3:80"));
        is("example", "/", None);
        is("other", "/", None);
        is("a.example", "*", Some("0:80"));
    }

    #[test]
    fn only_the_highest_epoch_serves_and_state_is_carried_over() {
        let uid = Uid::from_random([1; 16]);
        let backend = |epoch, port| plan::Backend {
            uid,
            address: ([127, 0, 0, 1], port).into(),
            zone: "zone-a".parse().unwrap(),
            epoch,
            ready: true,
            newer: false,
        };
        let mut plan = table(&[("a", "/")]);
        plan.services[0].backends = vec![backend(2, 2), backend(1, 1)];
        let first = compile(plan.clone(), None);
        assert_eq!(first.services[0].members.len(), 1);
        let held = first.services[0].members[0].backend.clone();
        assert_eq!(held.epoch, 2);
        let second = compile(plan.clone(), Some(&first));
        assert!(Arc::ptr_eq(&held, &second.services[0].members[0].backend));
        plan.services[0].backends.push(backend(3, 3));
        let third = compile(plan, Some(&second));
        assert_eq!(third.services[0].members[0].backend.epoch, 3);
    }

    #[test]
    fn a_route_without_service_is_left_out() {
        let mut plan = table(&[("a", "/")]);
        plan.routes[0].service = 7;
        assert!(compile(plan, None).route("a", "/").is_none());
    }
}
