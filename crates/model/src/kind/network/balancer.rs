//! One address for many targets: each host balances the connections that begin on it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::app::PATH_PATTERN;
use super::super::{Column, Home, Kind, Scope, Verbs};
use super::NetworkRef;
use crate::plan::{BalancedProtocol, ProxyProtocol};
use crate::{Condition, FieldError, Name};

/// Load balancers of one network.
pub const MAX_BALANCERS: usize = 100;
const MAX_LISTENERS: usize = 16;
const MAX_TARGETS: usize = 64;

/// Who takes connections: all ready instances of an app, by their NIC in the balancer's network, or one NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Balanced {
    App(Name),
    /// It counts as healthy while its instance is ready.
    Nic(Name),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BalancerTarget {
    pub to: Balanced,
    /// The listener's own, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Of each instance: its share of new connections.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 256))]
    pub weight: u16,
}

fn one() -> u16 {
    1
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BalancerListener {
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    #[serde(default = "tcp")]
    pub protocol: BalancedProtocol,
    /// A client's address decides: it keeps its target as long as the targets stay the same.
    #[serde(default)]
    pub source_hash: bool,
    #[schemars(length(max = MAX_TARGETS))]
    pub targets: Vec<BalancerTarget>,
    /// Besides that an instance must be ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<BalancerCheck>,
    /// Of a TCP listener: each host relays its connections, from the client's own address, and tells targets first who the
    /// client is and which address it called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

fn tcp() -> BalancedProtocol {
    BalancedProtocol::Tcp
}

/// What an HTTP/1.1 GET without a body must be answered with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpectedAnswer {
    #[schemars(length(min = 1, max = 1024), regex(pattern = PATH_PATTERN))]
    pub path: String,
    /// Any of 200 to 399, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 100, max = 599))]
    pub status: Option<u16>,
}

/// How each host that balances finds out by itself whether targets answer. The target sees its gateway as the one that asks,
/// whatever its security groups say. A target that does not answer gets no new connections, unless none of the listener's does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BalancerCheck {
    /// A TCP connection that opens is enough, without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<ExpectedAnswer>,
    /// A TCP port. The target's own, without it; a UDP listener needs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    #[schemars(range(min = 1, max = 300))]
    pub interval_seconds: u32,
    #[schemars(range(min = 1, max = 60))]
    pub timeout_seconds: u32,
    /// So many failures in a row take a target out.
    #[schemars(range(min = 1, max = 10))]
    pub failures: u32,
    /// So many successes in a row bring it back.
    #[schemars(range(min = 1, max = 10))]
    pub successes: u32,
}

impl Default for BalancerCheck {
    fn default() -> Self {
        Self { http: None, port: None, interval_seconds: 5, timeout_seconds: 2, failures: 3, successes: 2 }
    }
}

#[derive(Debug, Clone)]
pub struct LoadBalancer;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerSpec {
    /// Where its address is from: its IPv4 network, else its IPv6 network.
    pub subnet: Name,
    #[schemars(length(min = 1, max = MAX_LISTENERS))]
    pub listeners: Vec<BalancerListener>,
}

impl Default for LoadBalancerSpec {
    fn default() -> Self {
        Self { subnet: "none".parse().expect("a well-formed name"), listeners: Vec::new() }
    }
}

/// Of a balancer's targets that are out so many are told, the first by listener and address.
pub const MAX_OUT: usize = 64;

/// Why a target gets no new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum TargetTrouble {
    /// Its instance is not: nobody gives it any.
    NotReady,
    /// It fails the listener's check at some hosts, which give it none.
    Failing,
}

/// A target of a listener that is out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetOut {
    /// The listener's.
    pub port: u16,
    pub protocol: BalancedProtocol,
    #[schemars(with = "String")]
    pub address: IpAddr,
    pub target_port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Name>,
    pub reason: TargetTrouble,
    /// In a clause, by one of the hosts that say so.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// How many hosts say so.
    #[serde(default)]
    pub hosts: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address4: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address6: Option<Ipv6Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRef>,
    /// Different addresses that listeners lead to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<u32>,
    /// Of these, those that are not out at any listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthy_targets: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub out: Vec<TargetOut>,
    pub conditions: Vec<Condition>,
}

impl Kind for LoadBalancer {
    const KIND: &'static str = "LoadBalancer";
    const PLURAL: &'static str = "load-balancers";
    const SHORT: &'static [&'static str] = &["lb", "load-balancer"];
    const ABOUT: &'static str =
        "An address of a subnet whose connections are shared out over instances that are ready.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("SUBNET", "/spec/subnet"),
        Column::new("ADDRESS4", "/status/address4"),
        Column::new("ADDRESS6", "/status/address6"),
        Column::count("LISTENERS", "/spec/listeners"),
        Column::of("TARGETS", "/status/healthyTargets", "/status/targets"),
    ];
    type Spec = LoadBalancerSpec;
    type Status = LoadBalancerStatus;

    const IMMUTABLE: &'static [&'static str] = &["subnet"];

    fn validate(spec: &LoadBalancerSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if !(1..=MAX_LISTENERS).contains(&spec.listeners.len()) {
            errors.push(FieldError::new("spec.listeners", format!("between 1 and {MAX_LISTENERS}")));
        }
        for (i, listener) in spec.listeners.iter().enumerate().take(MAX_LISTENERS) {
            let mut check = |ok: bool, field: &str, message: &str| {
                if !ok {
                    errors.push(FieldError::new(format!("spec.listeners[{i}].{field}"), message));
                }
            };
            let same = |l: &BalancerListener| (l.port, l.protocol) == (listener.port, listener.protocol);
            check(!spec.listeners[..i].iter().any(same), "port", "listed twice");
            check(listener.port != 0, "port", "between 1 and 65535");
            check(listener.targets.len() <= MAX_TARGETS, "targets", "at most 64");
            for (j, target) in listener.targets.iter().enumerate().take(MAX_TARGETS) {
                check((1..=256).contains(&target.weight), &format!("targets[{j}].weight"), "between 1 and 256");
                check(target.port != Some(0), &format!("targets[{j}].port"), "between 1 and 65535");
            }
            let relayed = listener.proxy_protocol.is_some() && listener.protocol == BalancedProtocol::Udp;
            check(!relayed, "proxyProtocol", "of a TCP listener only: datagrams have no beginning to put it before");
            if let Some(health) = &listener.check {
                let needs_port = listener.protocol == BalancedProtocol::Udp && health.port.is_none();
                check(!needs_port, "check.port", "a UDP listener's targets are checked at a TCP port: name it");
                check(health.port != Some(0), "check.port", "between 1 and 65535");
                check((1..=300).contains(&health.interval_seconds), "check.intervalSeconds", "between 1 and 300");
                check((1..=60).contains(&health.timeout_seconds), "check.timeoutSeconds", "between 1 and 60");
                check((1..=10).contains(&health.failures), "check.failures", "between 1 and 10");
                check((1..=10).contains(&health.successes), "check.successes", "between 1 and 10");
                if let Some(ExpectedAnswer { path, status }) = &health.http {
                    let good =
                        path.starts_with('/') && path.len() <= 1024 && path.bytes().all(|b| b.is_ascii_graphic());
                    check(good, "check.http.path", "begins with / and has no space");
                    let known = status.is_none_or(|s| (100..=599).contains(&s));
                    check(known, "check.http.status", "between 100 and 599");
                }
            }
        }
        errors
    }

    fn example() -> LoadBalancerSpec {
        let name = |text: &str| text.parse::<Name>().expect("a well-formed name");
        let targets = vec![BalancerTarget { to: Balanced::App(name("web")), port: Some(8080), weight: 1 }];
        let http = Some(ExpectedAnswer { path: "/healthz".to_owned(), status: None });
        let check = Some(BalancerCheck { http, ..BalancerCheck::default() });
        let listener =
            BalancerListener { port: 80, protocol: tcp(), source_hash: false, targets, check, proxy_protocol: None };
        LoadBalancerSpec { subnet: name("web"), listeners: vec![listener] }
    }
}
