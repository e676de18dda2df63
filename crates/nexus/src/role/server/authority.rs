//! The region's authority at a server that holds its key: certificates for those who join, and new ones for those whose
//! end comes near. Everybody trusts the root above it, whose key no server needs.
//!
//! Who asks proves that it has the key (PKCS #10) and names exactly the ids that it may have; what else a certificate says
//! is decided here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use nexus_env::Env;
use nexus_iam::{CaError, CertRequest, CertificateAuthority, SpiffeId, at_millis, pin_of};
use nexus_model::plan::Renewed;
use nexus_model::{ApiError, Code};

use crate::config::{AuthorityFiles, ServerConfig};

/// How long a workload's certificate is good: it is renewed at half of it, by a host that may be gone tomorrow.
const WORKLOAD_LIFE: Duration = Duration::from_secs(3600);

pub struct Authority {
    ca: CertificateAuthority,
    /// How long what is signed here is good, for members and for what users see.
    life: Duration,
    public_life: Duration,
    env: Env,
}

/// Names by which users reach a server, for the certificate that they see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PublicNames {
    pub dns: Vec<String>,
    pub ips: Vec<IpAddr>,
}

impl PublicNames {
    /// Those of a server: its own name, this machine, and what its API's address and `more` say.
    pub fn of(server: &str, api: &str, more: &[String]) -> Result<Self, String> {
        let mut names = Self { dns: vec!["localhost".to_owned()], ips: Vec::new() };
        names.ips.extend([IpAddr::from([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.into()]);
        let host = host_of(api).ok_or_else(|| format!("{api:?} is not a URL such as https://10.0.0.4:8443"))?;
        for name in std::iter::once(host).chain(std::iter::once(server)).chain(more.iter().map(String::as_str)) {
            match name.parse::<IpAddr>() {
                Ok(ip) if !names.ips.contains(&ip) => names.ips.push(ip),
                Ok(_) => {}
                Err(_) => {
                    let known = rustls_pki_types::DnsName::try_from(name).map_err(|_| {
                        let shown: String = name.chars().take(80).collect();
                        format!("{shown:?} is neither a DNS name nor an IP address")
                    })?;
                    if !names.dns.iter().any(|d| d == known.as_ref()) {
                        names.dns.push(name.to_owned());
                    }
                }
            }
        }
        Ok(names)
    }
}

/// The host of an `https://host:port`.
fn host_of(api: &str) -> Option<&str> {
    let rest = api.strip_prefix("https://")?;
    let authority = rest.split('/').next().filter(|a| !a.is_empty())?;
    if let Some(v6) = authority.strip_prefix('[') {
        return v6.split_once(']').map(|(host, _)| host);
    }
    Some(authority.rsplit_once(':').map_or(authority, |(host, _)| host)).filter(|h| !h.is_empty())
}

fn failed(error: &CaError) -> ApiError {
    ApiError::new(Code::Internal, format!("the authority can't issue: {error}"))
}

impl Authority {
    /// Reads the authority that the configuration names, if it names one. Its key must be private to its owner.
    pub fn load(config: &ServerConfig, env: &Env) -> anyhow::Result<Option<Arc<Self>>> {
        let Some(files) = &config.authority else { return Ok(None) };
        let ca = read(files)?;
        anyhow::ensure!(
            ca.trust_domain() == config.cluster_id,
            "the authority {} is of the cluster {}, not {}",
            files.cert.display(),
            ca.trust_domain(),
            config.cluster_id
        );
        let (life, public_life) = (files.certificate_life(), files.public_certificate_life());
        Ok(Some(Arc::new(Self { ca, life, public_life, env: env.clone() })))
    }

    pub fn root_pem(&self) -> &str {
        self.ca.root_pem()
    }

    /// The authority's certificate and those above it.
    pub fn cert_pem(&self) -> String {
        self.ca.to_pem().cert
    }

    pub fn not_after(&self) -> SystemTime {
        self.ca.not_after()
    }

    /// For another server, which then can sign too.
    pub fn key_pem(&self) -> String {
        self.ca.to_pem().key
    }

    pub fn pin(&self) -> String {
        pin_of(self.ca.root_pem()).expect("read when the authority was loaded")
    }

    /// Signs for one id. Names are for the ids under `api/` alone.
    pub fn sign(&self, request: &CertRequest, id: &SpiffeId, names: &PublicNames) -> Result<String, ApiError> {
        let now = at_millis(self.env.now_millis());
        let public = SpiffeId::api(id.trust_domain(), id.name()).is_ok_and(|api| api == *id);
        let life = if public { self.public_life } else { self.life };
        let signed = self.ca.sign(request, id, &names.dns, &names.ips, now, life).map_err(|e| failed(&e))?;
        Ok(signed.cert_chain_pem)
    }

    /// Signs for a workload, for an hour at most.
    pub fn sign_workload(&self, request: &CertRequest, id: &SpiffeId) -> Result<String, ApiError> {
        let (now, life) = (at_millis(self.env.now_millis()), self.life.min(WORKLOAD_LIFE));
        let signed = self.ca.sign(request, id, &[], &[], now, life).map_err(|e| failed(&e))?;
        Ok(signed.cert_chain_pem)
    }

    /// Signs anew whatever the caller asks for and may have: its own id, and a server also the id of its API.
    pub fn renew(&self, caller: &SpiffeId, csr: &str, names: &PublicNames) -> Result<Renewed, ApiError> {
        let request = CertRequest::from_pem(csr).map_err(|e| ApiError::new(Code::Invalid, e.to_string()))?;
        let api = match caller.role() {
            Some(nexus_iam::Role::Server) => SpiffeId::api(caller.trust_domain(), caller.name()).ok(),
            _ => None,
        };
        let mut certs = BTreeMap::new();
        for id in request.ids() {
            let public = api.as_ref() == Some(id);
            if id != caller && !public {
                let detail = format!("{caller} asks for a certificate of {id}: everyone renews their own alone");
                return Err(ApiError::new(Code::Forbidden, detail));
            }
            let none = PublicNames::default();
            certs.insert(id.to_string(), self.sign(&request, id, if public { names } else { &none })?);
        }
        Ok(Renewed { certs })
    }
}

fn read(files: &AuthorityFiles) -> anyhow::Result<CertificateAuthority> {
    let cert = std::fs::read_to_string(&files.cert).with_context(|| format!("reading {}", files.cert.display()))?;
    CertificateAuthority::from_pem(&cert, &crate::secret_file::read_text(&files.key)?)
        .with_context(|| format!("the authority {}", files.cert.display()))
}

#[cfg(test)]
mod tests {
    use nexus_iam::RequestKey;
    use nexus_iam::ca::CLOCK_SKEW;

    use super::*;
    use crate::config::{CERTIFICATE_LIFE, PUBLIC_CERTIFICATE_LIFE};

    fn authority() -> Authority {
        let env = Env::real();
        let now = at_millis(env.now_millis());
        let (life, public_life) = (CERTIFICATE_LIFE, PUBLIC_CERTIFICATE_LIFE);
        let ca = CertificateAuthority::generate("home", now, 10 * public_life).unwrap();
        Authority { ca: ca.intermediate("local", now, 5 * public_life).unwrap(), life, public_life, env }
    }

    #[test]
    fn a_server_is_reached_by_its_name_and_its_address() {
        let names = PublicNames::of("s4", "https://10.0.0.4:8443", &["cloud.example.org".into()]).unwrap();
        assert_eq!(names.dns, ["localhost", "s4", "cloud.example.org"]);
        assert!(names.ips.contains(&"10.0.0.4".parse().unwrap()));
        assert_eq!(host_of("https://[fd00::4]:8443/x"), Some("fd00::4"));
        assert_eq!(host_of("https://cloud.example.org"), Some("cloud.example.org"));
        for bad in ["http://a:1", "a:1", "https://", "https://:8443"] {
            assert_eq!(host_of(bad), None, "{bad}");
        }
        assert!(PublicNames::of("s4", "https://10.0.0.4:8443", &["a b".into()]).unwrap_err().contains("a b"));
    }

    #[test]
    fn everyone_renews_their_own_alone() {
        let authority = authority();
        let id = |role: &str, name: &str| format!("spiffe://home/{role}/{name}").parse::<SpiffeId>().unwrap();
        let key = RequestKey::generate().unwrap();
        let names = PublicNames::of("s1", "https://10.0.0.1:8443", &[]).unwrap();
        let renew = |caller: &SpiffeId, ids: &[SpiffeId]| authority.renew(caller, &key.request(ids).unwrap(), &names);

        let server = renew(&id("server", "s1"), &[id("server", "s1"), id("api", "s1")]).unwrap();
        assert_eq!(server.certs.len(), 2);
        let again = nexus_iam::Identity::from_pem(&server.certs["spiffe://home/api/s1"], &key.to_pem()).unwrap();
        assert_eq!(again.id(), id("api", "s1"));
        let member = nexus_iam::Identity::from_pem(&server.certs["spiffe://home/server/s1"], &key.to_pem()).unwrap();
        let life = |of: &nexus_iam::Identity| of.not_after().duration_since(of.not_before() + CLOCK_SKEW).unwrap();
        assert_eq!((life(&member), life(&again)), (CERTIFICATE_LIFE, PUBLIC_CERTIFICATE_LIFE));
        assert_eq!(renew(&id("agent", "h1"), &[id("agent", "h1")]).unwrap().certs.len(), 1);

        for (caller, wanted) in [
            (id("agent", "h1"), id("agent", "h2")),
            (id("agent", "h1"), id("server", "h1")),
            (id("agent", "h1"), id("api", "h1")),
            (id("server", "s1"), id("api", "s2")),
        ] {
            assert_eq!(renew(&caller, &[wanted]).unwrap_err().code, Code::Forbidden);
        }
        let garbage = authority.renew(&id("agent", "h1"), "garbage", &names).unwrap_err();
        assert_eq!(garbage.code, Code::Invalid);
    }
}
