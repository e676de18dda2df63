//! The contract of runtimes, held against the container runtime, and what is particular to containers and their images.
//!
//! The test binary is its own shim, which must have one thread: so there is no test harness but the few lines below. It
//! needs root and Debian's `busybox-static`.

mod containers;
mod hostile;
mod images;
mod keep;
mod suite;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use futures::FutureExt;

pub type Test = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[$crate::Test] = &[$((concat!(module_path!(), "::", stringify!($name)), || Box::pin($name()))),*];
    };
}

fn main() {
    let mut args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|a| a == "shim") {
        args.remove(0);
        std::process::exit(nexus_compute::container::shim_main(args));
    }
    let words: Vec<String> = args.into_iter().filter_map(|a| a.into_string().ok()).collect();
    let filters: Vec<&String> = words.iter().filter(|w| !w.starts_with('-')).collect();
    let tests = containers::TESTS.iter().chain(hostile::TESTS);
    let chosen: Vec<_> =
        tests.filter(|(name, _)| filters.is_empty() || filters.iter().any(|f| name.contains(*f))).collect();
    if words.iter().any(|w| w == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: containers need root");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut failed = 0;
    for (name, test) in &chosen {
        let passed = runtime.block_on(AssertUnwindSafe(test()).catch_unwind()).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed",
        if failed == 0 { "ok" } else { "FAILED" },
        chosen.len() - failed
    );
    std::process::exit(i32::from(failed != 0));
}
