//! Load by `wrk`, and nginx as the peer of what answers it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;

use crate::http::Client;
use crate::process::{self, Owned};

/// What `wrk` is to do.
pub struct Load<'a> {
    pub port: u16,
    pub path: &'a str,
    pub host: &'a str,
    pub token: Option<&'a str>,
    /// Each answer must have this body; `None` leaves bodies alone.
    pub body: Option<&'a str>,
    pub connections: u32,
    pub seconds: u32,
}

#[derive(Debug, Deserialize)]
pub struct Outcome {
    pub requests: u64,
    pub duration_us: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Answers with the wrong body.
    wrong: u64,
    /// Answers that were not 2xx or 3xx, and connections that broke.
    errors: u64,
}

impl Outcome {
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / (self.duration_us as f64 / 1e6)
    }
}

impl Load<'_> {
    /// Runs it. A wrong answer makes the figures void.
    pub fn run(&self, dir: &Path) -> anyhow::Result<Outcome> {
        let script = dir.join("load.lua");
        std::fs::write(&script, self.script()).context("writing wrk's script")?;
        let mut wrk = Command::new("wrk");
        wrk.args(["-t1", &format!("-c{}", self.connections), &format!("-d{}s", self.seconds), "--timeout", "10s"]);
        wrk.arg("-s").arg(&script).args(["-H", &format!("Host: {}", self.host)]);
        if let Some(token) = self.token {
            wrk.args(["-H", &format!("Authorization: Bearer {token}")]);
        }
        let printed = process::run(wrk.arg(format!("http://127.0.0.1:{}{}", self.port, self.path)))?;
        let line = printed.lines().find(|l| l.starts_with('{')).context("wrk printed no figures")?;
        let outcome: Outcome = serde_json::from_str(line).context("reading wrk's figures")?;
        if outcome.wrong > 0 || outcome.errors > 0 || outcome.requests == 0 {
            anyhow::bail!("the figures are void: of the answers to {}, some were wrong: {outcome:?}", self.path);
        }
        Ok(outcome)
    }

    fn script(&self) -> String {
        let check = self.body.map_or(String::new(), |body| {
            // A JSON text is a Lua text, for what is in these bodies.
            let body = serde_json::Value::from(body);
            format!("function response(status, headers, body) if body ~= {body} then wrong = wrong + 1 end end\n")
        });
        format!(
            r#"wrong = 0
local threads = {{}}
function setup(thread) table.insert(threads, thread) end
{check}
function done(summary, latency, requests)
  local all = 0
  for _, thread in ipairs(threads) do all = all + thread:get("wrong") end
  local e = summary.errors
  io.write(string.format(
    '{{"requests":%d,"duration_us":%d,"p50_us":%f,"p99_us":%f,"wrong":%d,"errors":%d}}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), all,
    e.status + e.connect + e.read + e.write + e.timeout))
end
"#
        )
    }
}

/// An nginx that answers everything with a constant.
pub struct Nginx {
    child: Owned,
    pub port: u16,
}

impl Nginx {
    pub fn start(dir: &Path, answer: usize) -> anyhow::Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = dir.join("nginx.conf");
        let at = dir.display();
        let text = format!(
            "worker_processes 2;\ndaemon off;\nerror_log {at}/nginx.log warn;\npid {at}/nginx.pid;\n\
             events {{ worker_connections 1024; }}\nhttp {{\naccess_log off;\nkeepalive_requests 100000000;\n\
             client_body_temp_path {at}/body;\nproxy_temp_path {at}/proxy;\nfastcgi_temp_path {at}/fastcgi;\n\
             uwsgi_temp_path {at}/uwsgi;\nscgi_temp_path {at}/scgi;\n\
             server {{ listen 127.0.0.1:{port}; default_type application/json; return 200 '{}'; }}\n}}\n",
            "x".repeat(answer)
        );
        std::fs::write(&config, text).context("writing nginx's configuration")?;
        let mut nginx = Command::new("nginx");
        nginx.arg("-c").arg(&config).arg("-p").arg(dir).args(["-e", &format!("{at}/nginx.log")]);
        let child = Owned(nginx.stdin(Stdio::null()).spawn().context("running nginx")?);
        let answers = || Client::connect(port, "localhost", None).and_then(|mut c| c.get("/")).ok();
        process::wait("nginx", Duration::from_secs(10), Duration::from_millis(20), answers)?;
        Ok(Self { child, port })
    }

    pub fn cpu_seconds(&self) -> f64 {
        process::cpu_seconds(&process::tree(self.child.0.id()))
    }
}
