//! Progress on standard error: a spinner or a bar for people, plain lines for logs.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// One line that tells what is going on now.
pub struct Progress {
    bar: Option<ProgressBar>,
    last: String,
}

impl Progress {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, last: String::new() }
    }

    /// Shows a message; without a terminal, only when it is a new one.
    pub fn say(&mut self, message: &str) {
        let message = super::output::plain(message);
        match &self.bar {
            Some(bar) => bar.set_message(message),
            None if self.last != message => {
                super::output::note(&message);
                self.last = message;
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Bytes on their way. Shows nothing without a terminal.
pub fn bytes(total: u64, what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")
        .expect("a constant template")
        .progress_chars("=> ");
    ProgressBar::new(total).with_style(style).with_message(what.to_owned())
}
