//! The simulator as the project's tests run it: clean seeds under every fault, and planted bugs that must be found.

use std::process::Command;

fn sim(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_nexus-sim")).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[test]
fn many_seeds_keep_every_promise_while_every_fault_strikes() {
    let (good, text) = sim(&["--seeds", "150"]);
    println!("{text}");
    assert!(good, "{text}");
}

#[test]
fn a_seed_does_the_same_each_time() {
    let (good, text) = sim(&["--seeds", "9", "--from", "7001", "--repeat"]);
    assert!(good && text.contains("9 of 9 seeds did the same twice"), "{text}");
}

#[test]
fn every_planted_bug_is_found_within_two_hundred_seeds() {
    let mutants = [
        "skipped-fsync",
        "dropped-compare",
        "stale-lease-read",
        "forgotten-epoch",
        "watch-gap",
        "no-relay",
        "hasty-host",
        "stuck-table",
        "skipped-global",
        "early-level",
        "trusted-clock",
        "eager-rollout",
        "eager-drain",
        "forgotten-end",
    ];
    for mutant in mutants {
        let (found, text) = sim(&["--mutant", mutant, "--seeds", "200"]);
        println!("{}", text.lines().last().unwrap_or_default());
        assert!(found, "{text}");
    }
}
