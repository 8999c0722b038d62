//! What `cargo xtask bench store` measures inside one process: the store without a server or a command line before it.
//!
//! `store_bench COMMAND KEY=VALUE...` does one thing and prints one JSON object. The bench calls it by turns with what it is compared
//! with, so every command leaves the store closed and settled behind it. Random numbers come from a seed: two runs do the same.

mod arguments;
mod collection;
mod figures;
mod files;
mod load;
mod random;
mod sealing;
mod snapshots;

use std::process::ExitCode;

use arguments::Arguments;

pub type Outcome<T = serde_json::Value> = Result<T, Box<dyn std::error::Error>>;

fn run(command: &str, arguments: &Arguments) -> Outcome {
    match command {
        "make-data" => files::make_data(arguments),
        "evict" => files::evict_all(arguments),
        "disk-speed" => files::disk_speed(arguments),
        "sync-loop" => files::sync_loop(arguments),
        "ideal" => files::ideal(arguments),
        "sealing" => sealing::steps(arguments),
        "load" => load::load(arguments),
        "history" => snapshots::history(arguments),
        "snapshots" => snapshots::beside_load(arguments),
        "many-snapshots" => snapshots::many(arguments),
        "collect-beside-load" => collection::beside_load(arguments),
        "collect-flat" => collection::flat(arguments),
        other => Err(format!("there is no command {other}").into()),
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    match Arguments::parse(words).and_then(|arguments| run(&command, &arguments)) {
        Ok(value) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("store_bench {command}: {error}");
            ExitCode::FAILURE
        }
    }
}
