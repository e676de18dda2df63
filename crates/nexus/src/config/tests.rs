//! Configurations that are read, and those that are refused.

use super::*;

fn load<C: Config>(text: &str) -> Result<C, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("role.toml");
    std::fs::write(&path, text).unwrap();
    C::load(&path)
}

#[test]
fn relative_paths_start_at_the_files_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gateway.toml");
    std::fs::write(&path, A_GATEWAY).unwrap();
    let config = GatewayConfig::load(&path).unwrap();
    assert_eq!(config.data_dir, dir.path().join("data"));
    assert_eq!(config.tls.ca, Path::new("/etc/ca.pem"));
}

#[test]
fn an_unknown_field_is_refused_by_name() {
    let error = load::<GatewayConfig>(&format!("http_lisen = 1\n{A_GATEWAY}")).unwrap_err().to_string();
    assert!(error.contains("http_lisen"), "{error}");
}

#[test]
fn an_etcd_is_told_in_one_text() {
    let text =
        "etcd://nexus@a:2379,b:2379/cloud?ca=/e/ca.pem&cert=/e/c.pem&key=/e/c.key&password-file=/e/p&compact=false";
    let store = StoreConfig::from_url(text).unwrap();
    assert_eq!(store.parts().unwrap(), (vec!["a:2379".to_owned(), "b:2379".to_owned()], "/cloud".to_owned()));
    let files = [&store.ca, &store.cert, &store.key, &store.password_file].map(|f| f.as_deref().unwrap());
    assert_eq!(files, ["/e/ca.pem", "/e/c.pem", "/e/c.key", "/e/p"].map(Path::new));
    assert!(store.user.as_deref() == Some("nexus") && !store.compact && !store.needs_no_files());
    assert!(StoreConfig::from_url("etcd://a:2379").unwrap().needs_no_files());
    for (bad, why) in [
        ("a:2379", "only etcd://"),
        ("etcd://a", "HOST:PORT"),
        ("etcd://a:1?ca=ca.pem", "whole path"),
        ("etcd://a:1?cacert=/e", "none of ca"),
        ("etcd://u@a:1", "password file"),
        ("etcd://u:secret@a:1", "command line"),
        ("etcd://a:1?cert=/c&key=/k", "needs `ca`"),
    ] {
        let error = StoreConfig::from_url(bad).unwrap_err();
        assert!(error.contains(why), "{bad}: {error}");
    }
}

#[test]
fn plain_http_is_for_loopback_only() {
    let member = Member {
        name: "server-a".parse().unwrap(),
        wire: "tcp:[fd00::1]:7440".parse().unwrap(),
        api: "https://127.0.0.1:8443".into(),
    };
    let tls = TlsFiles { ca: "ca".into(), cert: "cert".into(), key: "key".into() };
    let good = ServerConfig {
        name: "server-a".parse().unwrap(),
        node_id: 1,
        cluster_id: "home".into(),
        region: "local".parse().unwrap(),
        zone: "zone-a".parse().unwrap(),
        data_dir: "data".into(),
        backup_dir: None,
        store: None,
        audit_webhook: None,
        audit_keep: AuditKeep::default(),
        wire_listen: "[fd00::1]:7440".parse().unwrap(),
        api_tls_listen: "127.0.0.1:8443".parse().unwrap(),
        api_http_listen: Some("127.0.0.1:8453".parse().unwrap()),
        api_peer_listen: None,
        token_hash: "hash".into(),
        master_keys: None,
        domain: "localhost".into(),
        issuer: None,
        provider_networks: Vec::new(),
        registry_networks: Vec::new(),
        registry_ca_file: None,
        blob_grace_hours: default_grace(),
        webhook_networks: Vec::new(),
        zones: vec!["zone-a".parse().unwrap()],
        join: false,
        authority: None,
        tls: tls.clone(),
        api_tls: tls,
        cells: vec![BootstrapCell { name: "c".parse().unwrap(), zone: "zone-a".parse().unwrap() }],
        tier: Tier::default(),
        members: BTreeMap::from([(1, member)]),
        global: None,
    };
    let text = toml::to_string(&good).unwrap();
    assert_eq!(load::<ServerConfig>(&text).unwrap().members, good.members);

    let open = ServerConfig { api_http_listen: Some("0.0.0.0:80".parse().unwrap()), ..good.clone() };
    let error = load::<ServerConfig>(&toml::to_string(&open).unwrap()).unwrap_err().to_string();
    assert!(error.contains("api_http_listen"), "{error}");

    let hook = |url: &str| Some(WebhookConfig { url: url.into(), secret_file: "secret".into() });
    let tells = |url: &str| ServerConfig { audit_webhook: hook(url), ..good.clone() };
    for fine in ["https://siem.example.org/x", "http://127.0.0.1:9000/"] {
        load::<ServerConfig>(&toml::to_string(&tells(fine)).unwrap()).unwrap();
    }
    for wrong in ["http://siem.example.org/x", "siem", "ftp://siem.example.org/"] {
        let error = load::<ServerConfig>(&toml::to_string(&tells(wrong)).unwrap()).unwrap_err().to_string();
        assert!(error.contains("audit_webhook"), "{error}");
    }

    let stranger = ServerConfig { node_id: 2, ..good };
    let error = load::<ServerConfig>(&toml::to_string(&stranger).unwrap()).unwrap_err().to_string();
    assert!(error.contains("node_id"), "{error}");
}
