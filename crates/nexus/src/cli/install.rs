//! `nexus install`: systemd units for the roles of this machine.
//!
//! The units are plain files that `--print` shows. What they have in common: a role that fails is started again, for
//! ever, with a pause; it is told to stop by SIGTERM and has time to drain. What differs follows from what a role owns:
//!
//! * the keeper owns the instances. Its unit stops and restarts it alone (`KillMode=process`), so that instances live on,
//!   and reloading re-executes it in place; its cgroup is delegated to it;
//! * the agent comes after its keeper, but does not end with it;
//! * a gateway's listening socket belongs to systemd and outlives the gateway, so that users' connections wait in its
//!   queue while one process ends and the next begins;
//! * servers and gateways need no more of the machine than their folders and sockets, and get no more.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::output;
use crate::config::{AgentConfig, Config, GatewayConfig, KeeperConfig, ServerConfig};
use crate::exit::Fail;

const UNITS: &str = "/etc/systemd/system";
const PROGRAM: &str = "/usr/local/bin/nexus";
const HEAD: &str =
    "# Written by `nexus install`, which may write it again: put changes into a drop-in (`systemctl edit`).\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum InstalledRole {
    Server,
    Keeper,
    Agent,
    Gateway,
}

/// Writes systemd units that run a role on this machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus install --role server --config /var/lib/nexus-server/nexus.toml\n  \
    nexus install --role keeper --config /var/lib/nexus-host/keeper.toml --print\n\n\
    Doing it twice changes nothing. Nothing is started: the command says how.")]
pub struct InstallArgs {
    #[arg(long, value_enum)]
    role: InstalledRole,
    /// The role's configuration, as `nexus server init` or a join wrote it
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Shows the units and writes nothing
    #[arg(long)]
    print: bool,
    /// Where units are written
    #[arg(long, value_name = "DIR", default_value = UNITS)]
    unit_dir: PathBuf,
    /// The program that they run
    #[arg(long, value_name = "FILE", default_value = PROGRAM)]
    program: PathBuf,
}

/// A file for systemd.
#[derive(Debug, PartialEq, Eq)]
struct Unit {
    name: String,
    text: String,
}

pub fn run(args: &InstallArgs) -> anyhow::Result<()> {
    let config = std::path::absolute(&args.config).with_context(|| format!("the file {}", args.config.display()))?;
    let units = units(args.role, &config, &args.program)?;
    if args.print {
        let texts: Vec<String> =
            units.iter().map(|u| format!("# {}\n{}", args.unit_dir.join(&u.name).display(), u.text)).collect();
        return output::text(texts.join("\n").trim_end());
    }
    if !args.program.exists() {
        let detail =
            format!("{} does not exist: copy this program there, or name it with --program", args.program.display());
        return Err(Fail::not_found(detail).into());
    }
    std::fs::create_dir_all(&args.unit_dir).with_context(|| format!("making {}", args.unit_dir.display()))?;
    for unit in &units {
        let path = args.unit_dir.join(&unit.name);
        let same = std::fs::read_to_string(&path).is_ok_and(|text| text == unit.text);
        if same {
            output::text(&format!("{} is as it should be", path.display()))?;
            continue;
        }
        write_unit(&path, &unit.text)?;
        output::text(&format!("wrote {}", path.display()))?;
    }
    let start = units.last().map_or("", |u| u.name.as_str());
    let all: Vec<&str> = units.iter().map(|u| u.name.as_str()).collect();
    output::note(&format!(
        "Next:\n  systemctl daemon-reload\n  systemctl enable --now {}\n  journalctl -fu {start}",
        all.join(" ")
    ));
    if args.unit_dir == Path::new(UNITS) && !Path::new("/run/systemd/system").exists() {
        output::note("This machine was not booted by systemd: the units are for one that is.");
    }
    Ok(())
}

fn write_unit(path: &Path, text: &str) -> anyhow::Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("unit");
    let temporary = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&temporary, text).with_context(|| format!("writing {}", temporary.display()))?;
    std::fs::rename(&temporary, path).with_context(|| format!("writing {}", path.display()))
}

/// A path as systemd reads it back: quoted, with its own signs escaped (systemd.service(5), "Command lines").
fn quoted(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().filter(|t| !t.chars().any(char::is_control));
    let text = text.with_context(|| format!("{} is no path that a unit can hold", path.display()))?;
    Ok(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$")))
}

/// A path where systemd takes one without quotes.
fn bare(path: &Path) -> anyhow::Result<String> {
    let text =
        path.to_str().filter(|t| !t.chars().any(|c| c.is_control() || c.is_whitespace() || c == '"' || c == '\\'));
    let text = text.with_context(|| format!("{}: choose a folder without blanks in its name", path.display()))?;
    Ok(text.replace('%', "%%"))
}

fn load<C: Config>(path: &Path) -> anyhow::Result<C> {
    Ok(C::load(path)?)
}

fn units(role: InstalledRole, config: &Path, program: &Path) -> anyhow::Result<Vec<Unit>> {
    let command = |word: &str| -> anyhow::Result<String> {
        Ok(format!("{} {word} --config {}", quoted(program)?, quoted(config)?))
    };
    let home = config.parent().unwrap_or(Path::new("/"));
    match role {
        InstalledRole::Server => {
            let c: ServerConfig = load(config)?;
            let writable = [home, c.data_dir.as_path()];
            let text = service(
                &format!("CloudNexus server {}", c.name),
                "network-online.target",
                &command("server")?,
                &format!("{}{}", daemon("60"), confined(&writable)?),
            );
            Ok(vec![Unit { name: "nexus-server.service".into(), text }])
        }
        InstalledRole::Keeper => {
            load::<KeeperConfig>(config)?;
            // No Requires= and no BindsTo= towards it anywhere: nothing that fails may take the instances along.
            let text = service(
                "CloudNexus keeper: owns the instances of this host",
                "local-fs.target",
                &command("keeper")?,
                "KillMode=process\nExecReload=/bin/kill -HUP $MAINPID\nTimeoutStopSec=30\nOOMScoreAdjust=-900\n\
                 Delegate=yes\nTasksMax=infinity\nLimitNOFILE=1048576\nLimitNPROC=infinity\nLimitCORE=0\n",
            );
            Ok(vec![Unit { name: "nexus-keeper.service".into(), text }])
        }
        InstalledRole::Agent => {
            let c: AgentConfig = load(config)?;
            let text = service(
                &format!("CloudNexus agent of host {}", c.name),
                "network-online.target nexus-keeper.service",
                &command("agent")?,
                "KillMode=process\nTimeoutStopSec=30\nOOMScoreAdjust=-800\nLimitNOFILE=1048576\nLimitNPROC=infinity\nLimitCORE=0\n",
            );
            Ok(vec![Unit { name: "nexus-agent.service".into(), text }])
        }
        InstalledRole::Gateway => {
            let c: GatewayConfig = load(config)?;
            let socket = format!(
                "{HEAD}[Unit]\nDescription=CloudNexus gateway {}: users' connections\n\n[Socket]\nListenStream={}\n\
                 FileDescriptorName=http\nBacklog=4096\nNoDelay=true\nReusePort=true\nService=nexus-gateway.service\n\n\
                 [Install]\nWantedBy=sockets.target\n",
                c.name, c.http_listen
            );
            let mut rest = daemon("45");
            rest.push_str(&confined(&[home, c.data_dir.as_path()])?);
            rest.push_str("AmbientCapabilities=CAP_NET_BIND_SERVICE\n");
            let text = service(
                &format!("CloudNexus gateway {}", c.name),
                "network-online.target nexus-gateway.socket",
                &command("gateway")?,
                &rest,
            );
            let text = text.replace("[Service]\n", "[Service]\nSockets=nexus-gateway.socket\n");
            let text = text.replace("\n\n[Service]", "\nRequires=nexus-gateway.socket\n\n[Service]");
            Ok(vec![
                Unit { name: "nexus-gateway.socket".into(), text: socket },
                Unit { name: "nexus-gateway.service".into(), text },
            ])
        }
    }
}

fn service(about: &str, after: &str, command: &str, rest: &str) -> String {
    let mut text = HEAD.to_owned();
    let _ = write!(text, "[Unit]\nDescription={about}\nAfter={after}\n");
    if after.contains("network-online.target") {
        text.push_str("Wants=network-online.target\n");
    }
    // A role that can't start now may be able to later: systemd must not give up.
    text.push_str("StartLimitIntervalSec=0\n\n[Service]\nType=exec\n");
    let _ =
        write!(text, "ExecStart={command}\nRestart=always\nRestartSec=2\nEnvironment=NEXUS_LOG=info,openraft=warn\n");
    text.push_str(rest);
    text.push_str("\n[Install]\nWantedBy=multi-user.target\n");
    text
}

/// What every process without instances has.
fn daemon(stop: &str) -> String {
    format!("KillMode=mixed\nTimeoutStopSec={stop}\nLimitNOFILE=1048576\nLimitCORE=0\n")
}

/// What a role may not do that needs nothing but its folders and the network.
fn confined(writable: &[&Path]) -> anyhow::Result<String> {
    let mut paths: Vec<String> = writable.iter().map(|p| bare(p)).collect::<anyhow::Result<_>>()?;
    paths.sort();
    paths.dedup();
    let mut text = String::from(
        "UMask=0077\nNoNewPrivileges=yes\nProtectSystem=strict\nProtectHome=read-only\nPrivateTmp=yes\nPrivateDevices=yes\n\
         ProtectKernelTunables=yes\nProtectKernelModules=yes\nProtectKernelLogs=yes\nProtectControlGroups=yes\n\
         ProtectHostname=yes\nProtectClock=yes\nRestrictNamespaces=yes\nRestrictRealtime=yes\nRestrictSUIDSGID=yes\n\
         LockPersonality=yes\nMemoryDenyWriteExecute=yes\nSystemCallArchitectures=native\n\
         RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\nCapabilityBoundingSet=CAP_NET_BIND_SERVICE\n",
    );
    let _ = writeln!(text, "ReadWritePaths={}", paths.join(" "));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn gateway(dir: &Path) -> PathBuf {
        let path = dir.join("gateway.toml");
        std::fs::write(&path, crate::config::A_GATEWAY).unwrap();
        path
    }

    /// Whether systemd itself finds nothing to complain about, where it is installed.
    fn verified(dir: &Path, units: &[Unit]) {
        for unit in units {
            std::fs::write(dir.join(&unit.name), &unit.text).unwrap();
        }
        let files = units.iter().map(|u| dir.join(&u.name));
        let Ok(output) = Command::new("systemd-analyze").arg("verify").arg("--man=no").args(files).output() else {
            eprintln!("systemd-analyze is not installed: the units are not verified");
            return;
        };
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let complaints: Vec<&str> = text.lines().filter(|l| l.contains("nexus-")).collect();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }

    #[test]
    fn a_gateways_socket_outlives_it() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(InstalledRole::Gateway, &gateway(dir.path()), Path::new("/bin/true")).unwrap();
        let [socket, service] = &units[..] else { panic!("{units:?}") };
        assert!(socket.text.contains("ListenStream=127.0.0.1:8000\n"), "{}", socket.text);
        assert!(service.text.contains("Requires=nexus-gateway.socket\n"), "{}", service.text);
        assert!(
            service.text.contains(&format!("ReadWritePaths={0} {0}/data\n", dir.path().display())),
            "{}",
            service.text
        );
        verified(dir.path(), &units);
    }

    #[test]
    fn a_keepers_children_live_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keeper.toml");
        std::fs::write(&path, "socket = \"/run/nexus/keeper.sock\"\nstate_dir = \"/run/nexus/keeper\"\n").unwrap();
        let units = units(InstalledRole::Keeper, &path, Path::new("/bin/true")).unwrap();
        assert!(units[0].text.contains("KillMode=process\n") && units[0].text.contains("Delegate=yes\n"));
        verified(dir.path(), &units);
    }

    #[test]
    fn installing_twice_changes_nothing_and_another_roles_configuration_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let args = InstallArgs {
            role: InstalledRole::Gateway,
            config: gateway(dir.path()),
            print: false,
            unit_dir: dir.path().join("units"),
            program: "/bin/true".into(),
        };
        run(&args).unwrap();
        let stamp = |name: &str| std::fs::metadata(args.unit_dir.join(name)).unwrap().modified().unwrap();
        let before = stamp("nexus-gateway.service");
        run(&args).unwrap();
        assert_eq!(stamp("nexus-gateway.service"), before);
        let wrong = units(InstalledRole::Server, &args.config, Path::new("/bin/true")).unwrap_err();
        assert!(wrong.to_string().contains("configuration of this role"), "{wrong}");
        let missing = InstallArgs { program: dir.path().join("nexus"), ..args };
        assert_eq!(crate::exit::code_of(&run(&missing).unwrap_err()), 3);
    }

    #[test]
    fn paths_are_written_as_systemd_reads_them() {
        assert_eq!(quoted(Path::new("/a b/100%$x")).unwrap(), "\"/a b/100%%$$x\"");
        assert!(bare(Path::new("/a b")).is_err());
        assert!(quoted(Path::new("/a\nb")).is_err());
    }
}
