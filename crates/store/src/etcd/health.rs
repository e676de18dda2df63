//! How the etcd cluster itself is, asked over the engine's own way to it: one connection to each endpoint.

use std::time::Duration;

use nexus_env::Env;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Config;
use super::grpc::{Channel, GrpcError};
use super::proto::{Empty, MemberListResponse, StatusResponse};

const ASK: Duration = Duration::from_secs(2);
const OUT_OF_SPACE: &str =
    "out of space: compact and defragment it, or raise its quota, and then `etcdctl alarm disarm`";

/// One endpoint of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointHealth {
    /// `HOST at ADDRESS`, or the address alone.
    pub endpoint: String,
    /// It answered, be it with trouble.
    pub reachable: bool,
    /// The member's name in its cluster.
    pub name: String,
    pub version: String,
    /// This member leads the etcd cluster.
    pub leader: bool,
    /// Of its database file, and how much of that is in use.
    pub db_bytes: u64,
    pub db_bytes_in_use: u64,
    /// What is wrong with it: why it does not answer, that it knows no leader, its alarms.
    pub trouble: Option<String>,
}

/// The cluster, as far as the endpoints of the configuration can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdHealth {
    pub endpoints: Vec<EndpointHealth>,
    /// Members that no endpoint that answered leads to.
    pub others: Vec<String>,
}

impl EtcdHealth {
    /// Some member says that it is well, and none that it is full: the alarm is the whole cluster's.
    pub fn has_room(&self) -> bool {
        let full = self.endpoints.iter().any(|e| e.trouble.as_deref() == Some(OUT_OF_SPACE));
        !full && self.endpoints.iter().any(|e| e.reachable && e.trouble.is_none())
    }
}

/// A connection to each endpoint, made when it is first asked.
pub struct Probes(Vec<(String, std::sync::Arc<Channel>)>);

impl Probes {
    pub fn new(config: &Config, env: &Env) -> Self {
        let of = |endpoint: &super::EtcdEndpoint| {
            let channel = Channel::new(env.clone(), vec![endpoint.clone()], config.tls.clone(), config.login.clone());
            (endpoint.to_string(), std::sync::Arc::new(channel))
        };
        Self(config.endpoints.iter().map(of).collect())
    }

    pub fn close(&self) {
        self.0.iter().for_each(|(_, channel)| channel.close());
    }

    /// Asks all endpoints at once; takes two seconds at most.
    pub async fn ask(&self, config: &Config) -> EtcdHealth {
        let until = Instant::now() + ASK;
        let mut asked = JoinSet::new();
        for (i, (_, channel)) in self.0.iter().enumerate() {
            let channel = channel.clone();
            asked.spawn(async move {
                let status: Result<StatusResponse, _> =
                    channel.call("/etcdserverpb.Maintenance/Status", &Empty {}, until).await;
                let members: Result<MemberListResponse, _> = match &status {
                    Ok(_) => channel.call("/etcdserverpb.Cluster/MemberList", &Empty {}, until).await,
                    Err(error) => Err(error.clone()),
                };
                (i, status, members)
            });
        }
        let (mut answers, mut members) = (Vec::new(), Vec::new());
        for (i, status, list) in asked.join_all().await {
            if let Ok(list) = list {
                members = list.members;
            }
            answers.push((i, status));
        }
        answers.sort_by_key(|(i, _)| *i);
        let mut seen = Vec::new();
        let endpoints = answers.into_iter().map(|(i, status)| {
            let endpoint = self.0[i].0.clone();
            match status {
                Ok(status) => {
                    let id = status.header.as_ref().map_or(0, |h| h.member_id);
                    seen.push(id);
                    let name = members.iter().find(|m| m.id == id).map_or_else(String::new, |m| m.name.clone());
                    told(endpoint, name, id, &status)
                }
                Err(error) => EndpointHealth {
                    endpoint,
                    reachable: matches!(error, GrpcError::Status { .. }),
                    name: String::new(),
                    version: String::new(),
                    leader: false,
                    db_bytes: 0,
                    db_bytes_in_use: 0,
                    trouble: Some(config.explain(&error)),
                },
            }
        });
        let endpoints: Vec<EndpointHealth> = endpoints.collect();
        let unseen = members.iter().filter(|m| !seen.contains(&m.id));
        let others = unseen.map(|m| if m.name.is_empty() { format!("{:x}", m.id) } else { m.name.clone() }).collect();
        EtcdHealth { endpoints, others }
    }
}

fn told(endpoint: String, name: String, id: u64, status: &StatusResponse) -> EndpointHealth {
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    let alarm = |kind: &str| status.errors.iter().any(|e| e.contains(kind));
    let trouble = if alarm("NOSPACE") {
        Some(OUT_OF_SPACE.to_owned())
    } else if alarm("CORRUPT") {
        Some("its data is corrupt: see `etcdctl alarm list`, and replace this member".to_owned())
    } else if status.leader == 0 {
        Some("it knows no leader: a majority of etcd's members is needed".to_owned())
    } else {
        status.errors.first().cloned()
    };
    EndpointHealth {
        endpoint,
        reachable: true,
        name,
        version: status.version.clone(),
        leader: status.leader != 0 && status.leader == id,
        db_bytes: bytes(status.db_size),
        db_bytes_in_use: bytes(status.db_size_in_use),
        trouble,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_come_with_the_remedy() {
        let of = |errors: &[&str], leader| {
            let errors = errors.iter().map(|e| (*e).to_owned()).collect();
            told("e".into(), "m".into(), 7, &StatusResponse { errors, leader, ..StatusResponse::default() })
        };
        assert_eq!((of(&[], 7).trouble, of(&[], 7).leader), (None, true));
        assert!(!of(&[], 8).leader);
        assert!(of(&[], 0).trouble.is_some_and(|t| t.contains("majority")));
        assert!(of(&["memberID:7 alarm:NOSPACE "], 7).trouble.is_some_and(|t| t.contains("disarm")));
    }
}
