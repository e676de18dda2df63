//! An etcd of one member on loopback, in a folder of its own, for the cloud under test to keep its metadata in.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

pub struct Etcd {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Etcd {
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("nexus-e2e-etcd-").tempdir().unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (port, peer) = (free(), free());
        let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--max-txn-ops", "1024"])
            .args(["--logger", "zap", "--log-level", "error"])
            .stdin(Stdio::null())
            .spawn()
            .expect("running etcd: install Debian's etcd-server");
        Self { child, port, _dir: dir }
    }

    pub fn url(&self) -> String {
        format!("etcd://127.0.0.1:{}/e2e", self.port)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
