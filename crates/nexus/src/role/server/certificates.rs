//! When the certificates of this server, of the region's hosts and of its gateways end: for the status and for metrics.
//!
//! Hosts say it in their reports, so every server reads it in its copy of the log; gateways tell every server. A
//! certificate is *ending* when it was not renewed although most of the time for that is over. That is a warning and
//! nothing more: the data plane tolerates certificates that have ended for [`CERTIFICATE_GRACE`].

use std::time::{Duration, SystemTime};

use nexus_api::{Certificate, CertificateState};
use nexus_control::view::View;
use nexus_env::Env;
use nexus_iam::ca::CLOCK_SKEW;
use nexus_iam::tls::Identity;
use nexus_model::kind::Host;
use nexus_model::{Object, Timestamp};

use super::authority::Authority;
use super::fleet::Fleet;
use crate::config::{CERTIFICATE_LIFE, ServerConfig};
use crate::role::CERTIFICATE_GRACE;

/// So many hosts and so many gateways are named at most.
const NAMED: usize = 20;
/// Nobody needs to be warned earlier than this.
const SOON: Duration = Duration::from_secs(3 * 24 * 3600);
/// An operator needs time to fetch the root's key.
const AUTHORITY_SOON: Duration = Duration::from_secs(60 * 24 * 3600);

/// When a certificate is called ending: half of the time between the moment at which it should have been renewed and its
/// end is over.
fn soon(life: Duration) -> Duration {
    (life / 4).min(SOON)
}

#[derive(Clone)]
pub struct Expiry {
    env: Env,
    view: View,
    fleet: Fleet,
    server: String,
    /// How long members' certificates are good.
    life: Duration,
    /// What each is for, and the certificate, which is renewed in place.
    own: Vec<(&'static str, Identity)>,
    /// The region's, which only an operator renews.
    authority: Option<Timestamp>,
}

/// A certificate's end.
struct End {
    /// Whose it is.
    name: String,
    at: Timestamp,
    /// When before its end that is called near.
    soon: Duration,
}

impl Expiry {
    pub fn new(
        config: &ServerConfig,
        env: &Env,
        view: View,
        fleet: Fleet,
        own: Vec<(&'static str, Identity)>,
        authority: Option<&Authority>,
    ) -> Self {
        let life = config.authority.as_ref().map_or(CERTIFICATE_LIFE, |a| a.certificate_life());
        let authority = authority.map(|a| moment(a.not_after()));
        Self { env: env.clone(), view, fleet, server: config.name.to_string(), life, own, authority }
    }

    fn own(&self) -> Vec<End> {
        let of = |name: &str, at, soon| End { name: name.to_owned(), at, soon };
        let own = self.own.iter().map(|(name, identity)| {
            let signed = identity.not_before() + CLOCK_SKEW;
            let life = identity.not_after().duration_since(signed).unwrap_or_default();
            of(name, end_of(identity), soon(life))
        });
        own.chain(self.authority.map(|end| of("authority", end, AUTHORITY_SOON))).collect()
    }

    fn of_member(&self, name: String, at: Timestamp) -> End {
        End { name, at, soon: soon(self.life) }
    }

    /// Those of all hosts that have told, the first to end first.
    fn hosts(&self) -> Vec<End> {
        let mut ends: Vec<End> = self.view.read(|world| {
            let hosts = world.hosts.live.values();
            let of = |h: &Object<Host>| Some((format!("host {}", h.metadata.name), h.status.certificate_ends?));
            hosts.filter_map(of).map(|(name, at)| self.of_member(name, at)).collect()
        });
        ends.sort_by_key(|e| e.at);
        ends
    }

    fn gateways(&self) -> Vec<End> {
        let heard = self.fleet.gateways(self.env.monotonic()).into_iter();
        let mut ends: Vec<End> = heard.map(|(name, at)| self.of_member(format!("gateway {name}"), at)).collect();
        ends.sort_by_key(|e| e.at);
        ends
    }

    fn state(&self, end: &End) -> CertificateState {
        let left = end.at.as_millis() - self.env.now_millis();
        match left {
            ..=0 => CertificateState::Ended,
            _ if u128::from(left.unsigned_abs()) < end.soon.as_millis() => CertificateState::Ending,
            _ => CertificateState::Good,
        }
    }

    fn told(&self, end: End) -> Certificate {
        let state = self.state(&end);
        Certificate { name: end.name, not_after: end.at, state }
    }

    /// This server's own, those of gateways, and of hosts the one that ends first and those that are in trouble.
    pub fn all(&self) -> Vec<Certificate> {
        let of_hosts = self.hosts().into_iter().take(NAMED).map(|end| self.told(end)).enumerate();
        let of_hosts = of_hosts.filter(|(i, c)| *i == 0 || c.state != CertificateState::Good).map(|(_, c)| c);
        let own = self.own().into_iter().map(|end| self.told(end));
        own.chain(self.gateways().into_iter().take(NAMED).map(|end| self.told(end))).chain(of_hosts).collect()
    }

    /// The worst of what should have been renewed and was not, in a sentence.
    pub fn trouble(&self) -> Option<String> {
        let own = self.own().into_iter();
        let own = own.map(|e| End { name: format!("the {} certificate of {}", e.name, self.server), ..e });
        let others = self.gateways().into_iter().chain(self.hosts());
        let others = others.map(|e| End { name: format!("the certificate of {}", e.name), ..e });
        let mut bad: Vec<End> = own.chain(others).filter(|e| self.state(e) != CertificateState::Good).collect();
        bad.sort_by_key(|e| e.at);
        let first = bad.first()?;
        let (who, end) = (&first.name, first.at);
        let days = CERTIFICATE_GRACE.as_secs() / 86_400;
        let what = match self.state(first) {
            CertificateState::Ended => format!("ended at {end}; inside the fleet it is tolerated for {days} days"),
            _ => format!("ends at {end} and was not renewed"),
        };
        let more = if bad.len() > 1 { format!("; so do {} more", bad.len() - 1) } else { String::new() };
        Some(format!("{who} {what}{more}"))
    }

    /// Names, descriptions and values of what is measured.
    pub fn metrics(&self) -> Vec<(String, &'static str, i64)> {
        let left = |end: Timestamp| (end.as_millis() - self.env.now_millis()) / 1000;
        let mut all = Vec::new();
        for End { name, at, .. } in self.own() {
            let metric = format!("nexus_certificate_{name}_seconds_left");
            all.push((metric, "Until this server's certificate ends", left(at)));
        }
        for (role, ends) in [("host", self.hosts()), ("gateway", self.gateways())] {
            let ending = ends.iter().filter(|e| self.state(e) != CertificateState::Good).count();
            let ending = i64::try_from(ending).unwrap_or(i64::MAX);
            let metric = format!("nexus_{role}_certificates_ending");
            all.push((metric, "Certificates of this role that end soon, or have ended, and were not renewed", ending));
            if let Some(first) = ends.first() {
                let metric = format!("nexus_{role}_certificate_seconds_left");
                all.push((metric, "Until the first certificate of this role ends", left(first.at)));
            }
        }
        all
    }
}

/// When a certificate ends.
pub fn end_of(identity: &Identity) -> Timestamp {
    moment(identity.not_after())
}

fn moment(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_comes_between_a_renewal_that_failed_and_the_end() {
        let day = Duration::from_secs(86_400);
        assert_eq!(soon(90 * day), 3 * day);
        assert_eq!(soon(Duration::from_secs(30)), Duration::from_millis(7500));
    }
}
