//! Signing in by a real identity provider (npm `oidc-provider`): the real binary, its command line, and a script that fills
//! in the provider's forms as a browser would. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "../e2e/cloud.rs"]
mod cloud;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use cloud::Cloud;
use serde_json::{Value, json};

/// One release, so that a newer one is a change of ours and not a surprise.
const PROVIDER: &str = "oidc-provider@8.8.1";
const SECRET: &str = "a-secret-that-nobody-else-may-see";

/// The provider and what it needs, in cargo's target folder, put there if it is not.
fn modules() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let target = program.ancestors().nth(3).expect("cargo puts tests three folders deep");
    let folder = target.join("node-oidc-provider");
    if !folder.join("node_modules/oidc-provider").is_dir() {
        std::fs::create_dir_all(&folder).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--prefix"]);
        let output = npm.arg(&folder).arg(PROVIDER).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "npm: {}", String::from_utf8_lossy(&output.stderr));
    }
    folder
}

fn node(arguments: &[&str]) -> Command {
    let mut command = Command::new("node");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e_federation/provider.mjs")).args(arguments);
    command.env("MODULES", modules()).env("CLIENT_SECRET", SECRET).stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The provider, until it is dropped.
struct Provider {
    process: Child,
    issuer: String,
    people: PathBuf,
}

impl Provider {
    fn start(folder: &Path) -> Self {
        let people = folder.join("people.json");
        let provider =
            |people: &Path| node(&["serve", people.to_str().unwrap()]).stdout(Stdio::piped()).spawn().unwrap();
        std::fs::write(&people, "{}").unwrap();
        let mut process = provider(&people);
        let mut issuer = String::new();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        output.read_line(&mut issuer).unwrap();
        // It would die of a pipe that nobody reads.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        assert!(issuer.starts_with("http://127.0.0.1:"), "it did not start: {issuer:?}");
        Self { process, issuer: issuer.trim().to_owned(), people }
    }

    /// What it says of people from now on.
    fn says(&self, people: &Value) {
        std::fs::write(&self.people, people.to_string()).unwrap();
    }

    fn token(&self, client: &str, login: &str) -> String {
        said(&node(&["token", &self.issuer, client, login]).output().unwrap())
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Somebody with a context of their own.
struct Person<'a> {
    cloud: &'a Cloud,
    context: PathBuf,
    login: &'a str,
}

impl<'a> Person<'a> {
    fn new(cloud: &'a Cloud, login: &'a str) -> Self {
        let context = cloud.path(&format!("{login}.json"));
        std::fs::copy(cloud.path("context.json"), &context).unwrap();
        Self { cloud, context, login }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.cloud.command(args);
        command.env("NEXUS_CONFIG", &self.context);
        command
    }

    /// Signs in by the browser; the outcome of `nexus login`.
    fn sign_in(&self, provider: &str) -> Output {
        let mut login = self.command(&["login", "--org", "acme", "--provider", provider]);
        let mut login = login.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(login.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut heard = Vec::new();
        let url = lines.by_ref().find_map(|line| {
            let url = line.trim().starts_with("http://").then(|| line.trim().to_owned());
            heard.push(line);
            url
        });
        if let Some(url) = url {
            let browser = said(&node(&["browse", &url, self.login]).output().unwrap());
            assert!(browser.starts_with("200"), "{browser}");
        }
        heard.extend(lines);
        let output = login.wait_with_output().unwrap();
        Output { stderr: heard.join("\n").into_bytes(), ..output }
    }

    fn whoami(&self) -> Value {
        let text = said(&self.command(&["whoami", "-o", "json"]).output().unwrap());
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    fn is_refused(&self, provider: &str, why: &str) {
        let output = self.sign_in(provider);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(why), "{error}");
    }
}

fn manifests(issuer: &str) -> String {
    format!(
        r#"
apiVersion: cloudnexus/v1
kind: Organization
metadata: {{name: acme}}
spec: {{}}
---
apiVersion: cloudnexus/v1
kind: Group
metadata: {{name: developers, organization: acme}}
spec: {{}}
---
apiVersion: cloudnexus/v1
kind: ServiceAccount
metadata: {{name: deployer, organization: acme}}
spec: {{}}
---
apiVersion: cloudnexus/v1
kind: RoleBinding
metadata: {{name: developers-look, organization: acme}}
spec: {{role: viewer, subjects: [{{kind: Group, name: developers}}]}}
---
apiVersion: cloudnexus/v1
kind: IdentityProvider
metadata: {{name: corp, organization: acme}}
spec:
  issuer: {issuer}
  clientId: nexus
  scopes: [openid, profile]
  groups: {{engineering: [developers]}}
  exchange:
  - audience: ci
    claims: {{repository: acme/shop, ref: refs/heads/main}}
    serviceAccount: deployer
---
apiVersion: cloudnexus/v1
kind: IdentityProvider
metadata: {{name: confidential, organization: acme}}
spec:
  issuer: {issuer}
  clientId: confidential
  clientSecret: {SECRET}
  scopes: [openid, profile]
"#
    )
}

#[test]
fn people_and_pipelines_come_in_by_a_real_provider() {
    let files = tempfile::tempdir().unwrap();
    let provider = Provider::start(files.path());
    let ann = |groups: &[&str]| json!({"preferred_username": "ann", "name": "Ann Smith", "groups": groups});
    let job = |repository: &str| json!({"repository": repository, "ref": "refs/heads/main"});
    let people = |groups: &[&str]| json!({"u-1": ann(groups), "u-2": ann(&[]), "job": job("acme/shop"), "fork": job("evil/shop")});
    provider.says(&people(&["engineering", "choir"]));

    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    let manifest = files.path().join("acme.yaml");
    std::fs::write(&manifest, manifests(&provider.issuer)).unwrap();
    cloud.ok(&["apply", "-f", manifest.to_str().unwrap()]);
    // Without the secret it is kept.
    let bare = manifests(&provider.issuer).replace(&format!("  clientSecret: {SECRET}\n"), "");
    std::fs::write(&manifest, bare).unwrap();
    cloud.ok(&["apply", "-f", manifest.to_str().unwrap()]);

    let person = Person::new(&cloud, "u-1");
    let signed_in = person.sign_in("corp");
    assert!(signed_in.status.success(), "{}", String::from_utf8_lossy(&signed_in.stderr));
    let me = person.whoami();
    assert_eq!((&me["name"], &me["groups"]), (&json!("acme/ann"), &json!(["developers"])), "{me}");
    assert_eq!(me["roles"], json!([{"role": "viewer", "over": "organization acme"}]));
    let user = cloud.json(&["get", "user", "ann", "--org", "acme"]);
    assert_eq!(user["spec"]["identity"]["subject"], "u-1", "{user}");

    // What the provider takes is gone with the next sign-in, which may be by another of its clients, one with a secret.
    provider.says(&people(&[]));
    let signed_in = person.sign_in("confidential");
    assert!(signed_in.status.success(), "{}", String::from_utf8_lossy(&signed_in.stderr));
    let me = person.whoami();
    assert_eq!((&me["name"], &me["groups"]), (&json!("acme/ann"), &json!([])), "{me}");
    // Another person of the provider with the same name is not her.
    Person::new(&cloud, "u-2").is_refused("corp", "who is not that person");

    let token = files.path().join("token");
    let pipeline = Person::new(&cloud, "pipeline");
    let exchange = |login: &str| {
        std::fs::write(&token, provider.token("ci", login)).unwrap();
        let token = token.to_str().unwrap();
        pipeline.command(&["login", "--org", "acme", "--provider", "corp", "--exchange-token", token]).output().unwrap()
    };
    said(&exchange("job"));
    let me = pipeline.whoami();
    assert_eq!((&me["name"], &me["kind"]), (&json!("acme/deployer"), &json!("service-account")), "{me}");
    let refused = exchange("fork");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("repository"), "{error}");

    // Nothing of the secret is told, nor written down.
    let shown = cloud.ok(&["get", "identity-providers", "--org", "acme", "-o", "json"]);
    assert!(shown.contains("sealedSecret") && !shown.contains(SECRET));
    let mut grep = Command::new("grep");
    let found = grep.args(["-rl", SECRET]).arg(cloud.data_dir()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "it stands in files of the cloud");

    // Who is deleted stays out although the provider knows them.
    cloud.ok(&["delete", "user", "ann", "--org", "acme"]);
    person.is_refused("corp", "was deleted");
    cloud.down();
}
