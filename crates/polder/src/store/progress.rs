//! A bar on standard error for what takes long; nothing where that is no terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use polder_store::Step;

/// Shows steps as they come.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
}

impl Progress {
    pub fn new() -> Self {
        Progress { bar: std::io::stderr().is_terminal().then(ProgressBar::new_spinner), what: "" }
    }

    /// Shows how far it is.
    pub fn show(&mut self, step: Step) -> polder_store::Result<()> {
        let Some(bar) = &self.bar else { return Ok(()) };
        if self.what != step.what {
            self.what = step.what;
            let template = match step.total {
                0 => "{spinner} {msg} {pos}",
                _ => "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(step.what);
        }
        bar.set_length(step.total);
        bar.set_position(step.done);
        Ok(())
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
