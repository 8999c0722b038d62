//! `polder balloon`: how much of its memory a guest has.
//!
//! Sizes are what the guest is left with, as in virsh and in QEMU's monitor, not what is in the balloon.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use polder_basics::{ByteSize, MIB};
use polder_vmm::GuestShare;

use super::control_socket;
use super::folder::InstanceFolder;
use super::record::InstanceTable;
use crate::state_folder::StateFolder;

/// What a guest is left with at least: less no Linux survives.
const SHARE_BYTES_MIN: u64 = 32 * MIB;
const LOOK: Duration = Duration::from_millis(50);

/// Show how much of its memory a guest has, or ask it to have another amount
///
/// The rest of the memory goes back to the host until the guest is asked to have it again. A guest gives up only what it can spare.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct BalloonArguments {
    /// Name of the instance
    name: String,
    /// Memory that the guest is to have, 32M up to all that the instance was made with
    #[arg(value_parser = parse_share)]
    size: Option<ByteSize>,
    /// Seconds to wait until the guest has what it is to have
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
}

fn parse_share(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error: polder_basics::ParseSizeError| error.to_string())?;
    if size.0 < SHARE_BYTES_MIN {
        return Err(format!("a guest is left with at least {}", ByteSize(SHARE_BYTES_MIN)));
    }
    if !size.0.is_multiple_of(4096) {
        return Err("memory comes in whole pages of 4 KiB".to_owned());
    }
    Ok(size)
}

/// Carries out `polder balloon`.
pub fn balloon(arguments: &BalloonArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let record = InstanceTable::open(&state)?.get_active(&arguments.name)?;
    // The socket's path is true only while the folder is open.
    let folder = InstanceFolder::open(&state, &record.name)?;
    let socket = folder.control_socket();
    let mut share = match arguments.size {
        Some(size) if size.0 > record.ram_bytes => {
            bail!("{} has {} of memory, and cannot have {size}", record.name, ByteSize(record.ram_bytes))
        }
        size => control_socket::guest_share(&socket, size.map(|size| size.0))?,
    };
    if arguments.size.is_some() {
        let start = Instant::now();
        let timeout = Duration::from_secs(arguments.timeout);
        while share.actual_bytes != share.target_bytes && start.elapsed() < timeout {
            std::thread::sleep(LOOK);
            share = control_socket::guest_share(&socket, None)?;
        }
    }
    show(&share);
    Ok(ExitCode::SUCCESS)
}

fn show(share: &GuestShare) {
    println!("memory  {}", ByteSize(share.ram_bytes));
    println!("target  {}", ByteSize(share.target_bytes));
    println!("actual  {}", ByteSize(share.actual_bytes));
    if share.actual_bytes == share.target_bytes {
        return;
    }
    if share.is_heard {
        eprintln!("polder: the guest has not come to its target yet, or cannot spare more");
    } else {
        eprintln!("polder: the guest has no driver for the balloon yet; the target stands for when it has one");
    }
}
