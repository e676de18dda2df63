//! What the host measures of itself beside its load: the kernel's pressure figures, and how long a small durable write
//! takes. A host that can't measure something leaves it out, and placement goes by the rest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_env::{Env, on_disk};
use nexus_model::plan::HostTelemetry;
use tokio::sync::watch;

/// Between two writes to the disk.
const EVERY: Duration = Duration::from_secs(10);
/// What is written: a block.
const BLOCK: usize = 4096;
const FILE: &str = "disk-probe";

/// Reads the figures that the kernel keeps (Documentation/accounting/psi.rst).
pub(crate) fn measure(env: &Env, disk_us: Option<u32>) -> HostTelemetry {
    let pressure = |what: &str| {
        let text = env.disk.read(Path::new(&format!("/proc/pressure/{what}"))).ok()?;
        parse_pressure(&String::from_utf8_lossy(&text))
    };
    HostTelemetry {
        cpu_pressure: pressure("cpu"),
        memory_pressure: pressure("memory"),
        io_pressure: pressure("io"),
        disk_us,
    }
}

/// The share of the last ten seconds in which some task waited, in thousandths.
fn parse_pressure(text: &str) -> Option<u16> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent: f32 = line.split(' ').find_map(|field| field.strip_prefix("avg10="))?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some((percent * 10.0) as u16)
}

/// Writes a block to the host's disk now and then, and tells how long it took. Runs until it is dropped.
pub(crate) async fn probe_disk(env: Env, data_dir: PathBuf, told: watch::Sender<Option<u32>>) {
    loop {
        let (disk, path) = (env.disk.clone(), data_dir.join(FILE));
        let begun = env.monotonic();
        let written = on_disk(&env.disk, move || {
            let file = disk.create(&path)?;
            file.append(&[0; BLOCK])?;
            file.sync()
        });
        let took = match written.await.and_then(|written| written) {
            Ok(()) => Some(env.monotonic().saturating_sub(begun)),
            Err(error) => {
                tracing::debug!(%error, "the disk can't be measured");
                None
            }
        };
        told.send_replace(took.map(|took| u32::try_from(took.as_micros()).unwrap_or(u32::MAX)));
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_that_of_some_over_ten_seconds() {
        let text =
            "some avg10=12.34 avg60=1.00 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse_pressure(text), Some(123));
        assert_eq!(parse_pressure("some avg10=100.00 avg60=1.00 avg300=0.00 total=1"), Some(1000));
        for odd in ["", "full avg10=1.0", "some avg60=1.0", "some avg10=x", "some avg10=-1"] {
            assert_eq!(parse_pressure(odd), None, "{odd}");
        }
    }

    #[tokio::test]
    async fn a_durable_write_is_timed() {
        let dir = tempfile::tempdir().unwrap();
        let (told, mut tells) = watch::channel(None);
        let probing = tokio::spawn(probe_disk(Env::real(), dir.path().to_owned(), told));
        let measured = tokio::time::timeout(Duration::from_secs(60), tells.wait_for(Option::is_some)).await;
        assert!(measured.unwrap().unwrap().is_some_and(|us| us > 0));
        probing.abort();
        let figures = measure(&Env::real(), Some(7));
        assert_eq!(figures.disk_us, Some(7));
        assert_eq!(figures.cpu_pressure.is_some(), Path::new("/proc/pressure/cpu").exists());
    }
}
