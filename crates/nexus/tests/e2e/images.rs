//! Real images for the tests: Debian's nginx as an OCI layout, and the example function as a component.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    assert!(output.status.success(), "{shown}: {}", String::from_utf8_lossy(&output.stderr));
}

const NGINX_CONF: &str = "
user root;
worker_processes 1;
daemon off;
error_log /dev/stderr warn;
pid /tmp/nginx.pid;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server { listen [::]:80 ipv6only=off; root /srv; }
}
";

pub const PAGE: &str = "<h1>It is served by Debian's nginx</h1>\n";

/// Debian's own nginx, unpacked by mmdebstrap and made an image by umoci.
pub fn nginx(dir: &Path) -> PathBuf {
    let (layout, bundle, tree) = (dir.join("nginx"), dir.join("bundle"), dir.join("tree.tar"));
    let image = format!("{}:latest", layout.display());
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract", "--mode=root", "--include=nginx-light,base-files"])
        .arg("bookworm")
        .arg(&tree));
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &image]));
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    let root = bundle.join("rootfs");
    // Device nodes belong to no image: the host makes its own.
    run(Command::new("tar").arg("-C").arg(&root).args(["--exclude=./dev/*", "-xf"]).arg(&tree));
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
    std::fs::write(root.join("etc/nginx/nginx.conf"), NGINX_CONF).unwrap();
    std::fs::create_dir_all(root.join("srv")).unwrap();
    std::fs::write(root.join("srv/index.html"), PAGE).unwrap();
    run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
    run(Command::new("umoci").args(["config", "--image", &image, "--config.cmd", "/usr/sbin/nginx"]));
    layout
}

/// Debian's static busybox, serving a page by HTTP: made in a moment, for tests that are not about what runs.
#[allow(dead_code)] // Not every test program that has this file uses it.
pub fn busybox(dir: &Path) -> PathBuf {
    let (layout, bundle) = (dir.join("busybox"), dir.join("busybox-bundle"));
    let image = format!("{}:latest", layout.display());
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &image]));
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    let root = bundle.join("rootfs");
    for dir in ["bin", "etc", "srv", "tmp"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("Debian's busybox-static is installed");
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    std::fs::write(root.join("srv/index.html"), PAGE).unwrap();
    run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
    let mut config = Command::new("umoci");
    config.args(["config", "--image", &image, "--config.cmd", "/bin/busybox"]);
    for word in ["httpd", "-f", "-vv", "-p", "[::]:80", "-h", "/srv"] {
        config.args(["--config.cmd", word]);
    }
    run(&mut config);
    layout
}

/// Busybox's server, and this Debian's own curl and getent, which ask for names as nearly all programs do: by glibc.
#[allow(dead_code)] // Not every test program that has this file uses it.
pub fn curl(dir: &Path) -> PathBuf {
    let layout = busybox(dir);
    let (image, bundle) = (format!("{}:latest", layout.display()), dir.join("bundle"));
    let umoci = |verb: &str| {
        let done = Command::new("umoci").args([verb, "--image", &image]).arg(&bundle).status();
        assert!(done.unwrap().success(), "umoci {verb}");
    };
    umoci("unpack");
    let copy = |file: &Path| {
        let to = bundle.join("rootfs").join(file.strip_prefix("/").unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(file, to).unwrap();
    };
    for program in ["/usr/bin/curl", "/usr/bin/getent"] {
        copy(Path::new(program));
        let needed = Command::new("ldd").arg(program).output().unwrap();
        let needed = String::from_utf8(needed.stdout).unwrap();
        needed.split_whitespace().filter(|word| word.starts_with('/')).for_each(|file| copy(Path::new(file)));
    }
    umoci("repack");
    layout
}

/// The example function, built for wasm32-wasip2.
pub fn hello_function(dir: &Path) -> PathBuf {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hello-function");
    let target = dir.join("target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(&example).args(["build", "--release", "--locked", "--target", "wasm32-wasip2"]);
    cargo.arg("--target-dir").arg(&target);
    // Settings of the outer build are not the component's.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    run(&mut cargo);
    let built = target.join("wasm32-wasip2/release");
    let entries = std::fs::read_dir(&built).unwrap().flatten().map(|e| e.path());
    entries.into_iter().find(|p| p.extension().is_some_and(|e| e == "wasm")).expect("cargo built a component")
}
