//! A guide for operators, as a test follows it: its headings, and the blocks below each that are to be run.
//!
//! A block that begins with ```` ```sh run ```` is run as it stands there; what comes after `run` is the machine on which,
//! where a guide has several. Other blocks are for reading: they need what no test has, such as systemd or another
//! machine's file.

use std::path::Path;

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
