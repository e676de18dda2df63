//! One authority and one certificate for all of a bench: both sides pay for mutual TLS, neither for more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A folder with `ca.pem`, `leaf.pem` and `leaf.key`.
#[derive(Debug, Clone)]
pub struct Pki(PathBuf);

impl Pki {
    pub fn make(dir: &Path) -> anyhow::Result<Self> {
        let pki = Self(dir.to_owned());
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key)?;
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate()?;
        let names = ["nexus.internal", "localhost", "127.0.0.1"].map(str::to_owned);
        let leaf = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
        std::fs::write(pki.ca(), root.pem())?;
        std::fs::write(pki.cert(), leaf.pem())?;
        std::fs::write(pki.key(), key.serialize_pem())?;
        Ok(pki)
    }

    pub fn open(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    pub fn ca(&self) -> PathBuf {
        self.0.join("ca.pem")
    }

    pub fn cert(&self) -> PathBuf {
        self.0.join("leaf.pem")
    }

    pub fn key(&self) -> PathBuf {
        self.0.join("leaf.key")
    }

    fn roots(&self) -> anyhow::Result<Arc<RootCertStore>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.ca()).context("reading the authority")?)?;
        Ok(Arc::new(roots))
    }

    fn leaf(&self) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let cert = CertificateDer::from_pem_file(self.cert()).context("reading the certificate")?;
        Ok((vec![cert], PrivateKeyDer::from_pem_file(self.key()).context("reading the key")?))
    }

    pub fn server(&self, alpn: &[u8]) -> anyhow::Result<Arc<ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let callers =
            rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots()?, provider.clone()).build()?;
        let (chain, key) = self.leaf()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(callers)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(Arc::new(config))
    }

    pub fn client(&self, alpn: &[u8]) -> anyhow::Result<Arc<ClientConfig>> {
        let (chain, key) = self.leaf()?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(Arc::new(config))
    }
}
