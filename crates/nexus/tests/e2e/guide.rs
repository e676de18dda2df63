//! A guide for operators, as a test follows it: its headings, and the blocks below each that are to be run.
//!
//! A block that begins with ```` ```sh run ```` is run as it stands there; what comes after `run` is the machine on which,
//! where a guide has several. Other blocks are for reading: they need what no test has, such as systemd or another
//! machine's file.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

pub struct Block {
    /// The machine, if the guide names one.
    pub place: Option<String>,
    pub script: String,
}

/// The headings of a guide with the blocks to run below each; there must be so many of those at least.
pub fn sections(guide: &str, at_least: usize) -> Vec<(String, Vec<Block>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide").join(guide);
    let text = std::fs::read_to_string(path).unwrap();
    let mut found: Vec<(String, Vec<Block>)> = vec![(String::new(), Vec::new())];
    let mut block: Option<Block> = None;
    for line in text.lines() {
        match &mut block {
            Some(_) if line == "```" => found.last_mut().unwrap().1.extend(block.take()),
            Some(Block { script, .. }) => {
                script.push_str(line);
                script.push('\n');
            }
            None => {
                if let Some(place) = line.strip_prefix("```sh run") {
                    let place = Some(place.trim().to_owned()).filter(|p| !p.is_empty());
                    block = Some(Block { place, script: String::new() });
                } else if let Some(heading) = line.strip_prefix("## ") {
                    found.push((heading.to_owned(), Vec::new()));
                }
            }
        }
    }
    assert!(block.is_none(), "{guide}: a block without an end");
    let count: usize = found.iter().map(|(_, blocks)| blocks.len()).sum();
    assert!(count >= at_least, "{guide}: {count} blocks to run, and {at_least} are expected");
    found
}

/// Runs a script as a guide's reader would, whose home and folder is `home` and who has the cloud's `context.json` there. The
/// variables are those that the guide says to have.
#[allow(dead_code)] // Some tests have readers of their own.
pub fn run(home: &Path, script: &str, variables: &[(&str, &dyn AsRef<OsStr>)]) -> String {
    let programs = Path::new(env!("CARGO_BIN_EXE_nexus")).parent().unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("timeout");
    command.args(["240", "sh", "-euc", script]).stdin(Stdio::null()).current_dir(home);
    command.env("PATH", path).env("HOME", home).env("NEXUS_CONFIG", home.join("context.json"));
    command.env_remove("CNX_URL").env_remove("CNX_TOKEN");
    for (name, value) in variables {
        command.env(name, value);
    }
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{script}\n--- out\n{out}\n--- err\n{err}", output.status);
    format!("{out}{err}")
}

/// Runs a guide's blocks, and tells `after` each of its sections what they printed.
#[allow(dead_code)]
pub fn follow(
    home: &Path,
    guide: &str,
    at_least: usize,
    variables: &[(&str, &dyn AsRef<OsStr>)],
    mut after: impl FnMut(&str, &str),
) {
    for (heading, blocks) in sections(guide, at_least) {
        let mut printed = String::new();
        for block in blocks {
            assert_eq!(block.place, None, "this test has one machine");
            println!("{heading}: {}", block.script);
            printed.push_str(&run(home, &block.script, variables));
        }
        after(&heading, &printed);
    }
}
