//! Handshakes between members of a cluster and strangers, over a pipe in memory.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nexus_iam::tls::{Clock, public_client_config, public_server_config};
use nexus_iam::{
    CertificateAuthority, ExpiryPolicy, Identity, Policy, Role, Roots, SpiffeId, client_config, peer_id, server_config,
};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DAY: Duration = Duration::from_secs(86_400);
const H2: &[&[u8]] = &[b"h2"];

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn authority(trust_domain: &str) -> CertificateAuthority {
    CertificateAuthority::generate(trust_domain, now(), 365 * DAY).unwrap()
}

fn member(ca: &CertificateAuthority, role: Role, name: &str) -> Identity {
    let id = SpiffeId::of_role(ca.trust_domain(), role, name).unwrap();
    Identity::from_issued(&ca.issue(&id, &[], &[], now(), DAY).unwrap()).unwrap()
}

fn roots(ca: &CertificateAuthority) -> Roots {
    Roots::from_pem(ca.root_pem()).unwrap()
}

/// Whom each side saw, or why one refused.
async fn meet(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(Option<SpiffeId>, Option<SpiffeId>), String> {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let connect = async {
        let name = "nexus.internal".try_into().unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(client).connect(name, near).await.map_err(|e| e.to_string())?;
        // In TLS 1.3 the client is done before the server has judged it; a byte from the server settles it.
        tls.read_u8().await.map_err(|e| e.to_string())?;
        Ok::<_, String>(peer_id(tls.get_ref().1.peer_certificates().unwrap_or_default()))
    };
    let accept = async {
        let mut tls = tokio_rustls::TlsAcceptor::from(server).accept(far).await.map_err(|e| e.to_string())?;
        tls.write_u8(1).await.map_err(|e| e.to_string())?;
        tls.flush().await.map_err(|e| e.to_string())?;
        Ok::<_, String>(peer_id(tls.get_ref().1.peer_certificates().unwrap_or_default()))
    };
    let (saw_server, saw_client) = tokio::join!(connect, accept);
    Ok((saw_server?, saw_client?))
}

/// An agent and a server of `ca`, each letting in only the other's role, both at `at`.
async fn agent_meets_server(
    ca: &CertificateAuthority,
    agent: &Identity,
    server: &Identity,
    expiry: ExpiryPolicy,
    at: SystemTime,
) -> Result<(Option<SpiffeId>, Option<SpiffeId>), String> {
    let servers = Policy::roles("home", &[Role::Server]).expiry(expiry);
    let agents = Policy::roles("home", &[Role::Agent]).expiry(expiry);
    let client = client_config(agent, &roots(ca), servers, H2, Clock::fixed(at)).unwrap();
    let server = server_config(server, &roots(ca), agents, H2, Clock::fixed(at)).unwrap();
    meet(client, server).await
}

#[tokio::test]
async fn members_know_each_other_by_id() {
    let ca = authority("home");
    let (agent, server) = (member(&ca, Role::Agent, "h1"), member(&ca, Role::Server, "s1"));
    let met = agent_meets_server(&ca, &agent, &server, ExpiryPolicy::Strict, now()).await.unwrap();
    assert_eq!(met, (Some(server.id()), Some(agent.id())));
}

#[tokio::test]
async fn members_of_regions_with_authorities_of_their_own_know_each_other_by_the_root_alone() {
    let root = authority("home");
    let [west, east] = ["west", "east"].map(|region| root.intermediate(region, now(), 30 * DAY).unwrap());
    let (agent, server) = (member(&west, Role::Agent, "h1"), member(&east, Role::Server, "s1"));
    let direct = member(&root, Role::Agent, "h2");
    for agent in [&agent, &direct] {
        let met = agent_meets_server(&root, agent, &server, ExpiryPolicy::Strict, now()).await.unwrap();
        assert_eq!(met, (Some(server.id()), Some(agent.id())));
    }
    // An intermediate under a root of the same name is as strange as that root.
    let forged = member(&authority("home").intermediate("west", now(), DAY).unwrap(), Role::Agent, "h1");
    agent_meets_server(&root, &forged, &server, ExpiryPolicy::Strict, now()).await.unwrap_err();
    // Tolerance is for a leaf's end, also under an intermediate.
    let late = now() + 3 * DAY;
    agent_meets_server(&root, &agent, &server, ExpiryPolicy::Strict, late).await.unwrap_err();
    let tolerate = ExpiryPolicy::Tolerate { grace: 7 * DAY };
    agent_meets_server(&root, &agent, &server, tolerate, late).await.unwrap();
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (ca, impostor) = (authority("home"), authority("home"));
    let (agent, server) = (member(&ca, Role::Agent, "h1"), member(&ca, Role::Server, "s1"));
    let forged_agent = member(&impostor, Role::Agent, "h1");
    let forged_server = member(&impostor, Role::Server, "s1");
    assert_eq!(forged_agent.id(), agent.id(), "the forged id is the very same");
    agent_meets_server(&ca, &forged_agent, &server, ExpiryPolicy::Strict, now()).await.unwrap_err();
    agent_meets_server(&ca, &agent, &forged_server, ExpiryPolicy::Strict, now()).await.unwrap_err();
}

#[tokio::test]
async fn a_chain_through_a_members_own_certificate_is_refused() {
    let ca = authority("home");
    let server = member(&ca, Role::Server, "s1");
    // An agent signs a server's certificate with its own leaf and sends both.
    let id = SpiffeId::agent("home", "h1").unwrap();
    let agent = ca.issue(&id, &[], &[], now(), DAY).unwrap();
    let key = rcgen::KeyPair::from_pem(&agent.key_pem).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&agent.cert_chain_pem, key).unwrap();
    let forged_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://home/agent/h2".try_into().unwrap())];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let forged = params.signed_by(&forged_key, &issuer).unwrap();
    let chain = format!("{}{}", forged.pem(), agent.cert_chain_pem);
    let forged = Identity::from_pem(&chain, &forged_key.serialize_pem()).unwrap();
    agent_meets_server(&ca, &forged, &server, ExpiryPolicy::Strict, now()).await.unwrap_err();
}

#[tokio::test]
async fn the_wrong_role_is_refused_on_both_sides() {
    let ca = authority("home");
    let (agent, server) = (member(&ca, Role::Agent, "h1"), member(&ca, Role::Server, "s1"));
    let gateway = member(&ca, Role::Gateway, "g1");
    agent_meets_server(&ca, &gateway, &server, ExpiryPolicy::Strict, now()).await.unwrap_err();
    agent_meets_server(&ca, &agent, &gateway, ExpiryPolicy::Strict, now()).await.unwrap_err();
}

#[tokio::test]
async fn another_trust_domain_is_refused_even_under_a_trusted_root() {
    let (home, away) = (authority("home"), authority("away"));
    let both = Roots::from_pem(&format!("{}{}", home.root_pem(), away.root_pem())).unwrap();
    let policy = |role| Policy::roles("home", &[role]);
    let stranger = member(&away, Role::Agent, "h1");
    let server = member(&home, Role::Server, "s1");
    let client = client_config(&stranger, &both, policy(Role::Server), H2, Clock::fixed(now())).unwrap();
    let server = server_config(&server, &both, policy(Role::Agent), H2, Clock::fixed(now())).unwrap();
    meet(client, server).await.unwrap_err();
}

#[tokio::test]
async fn an_expired_certificate_is_tolerated_within_its_grace_only() {
    let ca = authority("home");
    let (agent, server) = (member(&ca, Role::Agent, "h1"), member(&ca, Role::Server, "s1"));
    let tolerate = ExpiryPolicy::Tolerate { grace: 7 * DAY };
    let meet_at = |expiry, at| agent_meets_server(&ca, &agent, &server, expiry, at);
    meet_at(ExpiryPolicy::Strict, now() + 2 * DAY).await.unwrap_err();
    let met = meet_at(tolerate, now() + 2 * DAY).await.unwrap();
    assert_eq!(met, (Some(server.id()), Some(agent.id())));
    meet_at(tolerate, now() + 9 * DAY).await.unwrap_err();
    meet_at(tolerate, now() - DAY).await.unwrap_err();
    // Tolerance is for the date and nothing else.
    let forged = member(&authority("home"), Role::Agent, "h1");
    agent_meets_server(&ca, &forged, &server, tolerate, now() + 2 * DAY).await.unwrap_err();
    let gateway = member(&ca, Role::Gateway, "g1");
    agent_meets_server(&ca, &gateway, &server, tolerate, now() + 2 * DAY).await.unwrap_err();
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let ca = authority("home");
    let server = member(&ca, Role::Server, "s1");
    let agents = Policy::roles("home", &[Role::Agent]);
    let server = server_config(&server, &roots(&ca), agents, H2, Clock::fixed(now())).unwrap();
    let nobody = public_client_config(&roots(&ca), H2, Clock::fixed(now())).unwrap();
    meet(nobody, server).await.unwrap_err();
}

#[tokio::test]
async fn a_renewed_identity_serves_without_a_new_configuration() {
    let ca = authority("home");
    let (agent, server) = (member(&ca, Role::Agent, "h1"), member(&ca, Role::Server, "s1"));
    let later = now() + 2 * DAY;
    agent_meets_server(&ca, &agent, &server, ExpiryPolicy::Strict, later).await.unwrap_err();
    for identity in [&agent, &server] {
        let renewed = ca.issue(&identity.id(), &[], &[], later, DAY).unwrap();
        identity.replace(&Identity::from_issued(&renewed).unwrap());
        assert_eq!(identity.not_after(), later + DAY);
    }
    agent_meets_server(&ca, &agent, &server, ExpiryPolicy::Strict, later).await.unwrap();
}

#[tokio::test]
async fn users_check_the_host_name() {
    let ca = authority("home");
    let id = SpiffeId::api("home", "front").unwrap();
    let names = ["nexus.internal".to_owned()];
    let api = Identity::from_issued(&ca.issue(&id, &names, &[], now(), DAY).unwrap()).unwrap();
    let clock = || Clock::fixed(now());
    let client = || public_client_config(&roots(&ca), H2, clock()).unwrap();
    let met = meet(client(), public_server_config(&api, H2, clock()).unwrap()).await.unwrap();
    assert_eq!(met, (Some(id), None));
    let unnamed = member(&ca, Role::Server, "s1");
    meet(client(), public_server_config(&unnamed, H2, clock()).unwrap()).await.unwrap_err();
}

#[test]
fn a_certificate_that_names_two_ids_has_none() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
    params.subject_alt_names = vec![uri("spiffe://home/agent/h1")];
    assert!(peer_id(&[params.self_signed(&key).unwrap().der().clone()]).is_some());
    params.subject_alt_names.push(uri("spiffe://home/server/s1"));
    let two = params.self_signed(&key).unwrap();
    assert_eq!(peer_id(&[two.der().clone()]), None);
    assert!(Identity::from_pem(&two.pem(), &key.serialize_pem()).is_err());
    assert_eq!(peer_id(&[]), None);
}
