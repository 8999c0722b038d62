//! The disk of an instance: a volume of the store that begins as the image's disk and shares with it what is not written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use polder_store::{Content, Store, StoreError};

use crate::state_folder::StateFolder;

/// How long a process that has ended may take to let go of its files.
const ENDING_PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(20);

/// The volume of an instance. No instance has a dot in its name, so that no other volume is meant by chance.
pub fn volume_name(instance: &str) -> String {
    format!("instance.{instance}")
}

/// Makes the volume of a new instance. One without an instance is what a crash left; it goes.
pub fn make(store: &Arc<Store>, instance: &str, image: &str) -> Result<()> {
    let name = volume_name(instance);
    remove_from(store, &name)?;
    store.create_volume(&name, &Content::Image(image))?;
    Ok(())
}

/// Removes the volume of an instance, if it is there.
pub fn remove(state: &StateFolder, instance: &str) -> Result<()> {
    remove_from(&crate::store::open(state)?, &volume_name(instance))
}

fn remove_from(store: &Arc<Store>, name: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        match store.remove_volume(name) {
            Err(StoreError::NotFound { .. }) => return Ok(()),
            // The threads of a process end one after the other, and the last of them closes its files.
            Err(StoreError::InUse { .. }) if start.elapsed() < ENDING_PATIENCE => std::thread::sleep(LOOK),
            result => return Ok(result?),
        }
    }
}
