//! Images in S3-compatible object stores: `polder store push` and `pull` with an `s3://` address, `attach`, `prefetch`, `detach` and
//! `remote`.
//!
//! Credentials come from the environment, as other programs for S3 take them, and are kept nowhere. Where an attached store is, is kept
//! beside our store, so that every process that has the credentials can read on.

use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use polder_basics::ByteSize;
use polder_store::remote::{
    self, Attached, Credentials, Elsewhere, PATIENCE_MAX, REGION_DEFAULT, Remote, RemoteAddress, RemoteError,
    RemoteOptions,
};
use polder_store::transfer::{NodeRef, TransferOptions};
use polder_store::{Replace, Store, StoreError};
use serde_json::json;

use super::transfer::node_ref;
use super::{Progress, rough};
use crate::image::utc;

/// Owners that are named where something is still needed.
const NAMED_MAX: usize = 5;

/// `s3://BUCKET/PREFIX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Url(String);

impl FromStr for S3Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        RemoteAddress::new(text).parts().map_err(|_| "write s3://BUCKET or s3://BUCKET/PREFIX".to_owned())?;
        Ok(S3Url(text.trim_end_matches('/').to_owned()))
    }
}

#[derive(Args)]
pub struct ServerArguments {
    /// The S3-compatible server, as http://HOST:PORT [default: AWS_ENDPOINT_URL, or Amazon's]
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The server's region [default: AWS_REGION, or us-east-1]
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// How long a server that does not answer is tried; for an attached image also how long a guest's read waits
    #[arg(long, value_name = "SECONDS", default_value_t = remote::PATIENCE_DEFAULT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=PATIENCE_MAX.as_secs()))]
    patience: u64,
}

/// Make an image of an object store an image here at once; what it is made of comes when it is read
///
/// Credentials are taken from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, by this command and by every later one that
/// reads what is not here yet: `polder run`, `boot`, `volume serve`, `image export`.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct AttachArguments {
    /// The image there
    image: String,
    /// The object store: s3://BUCKET/PREFIX
    place: S3Url,
    /// Name of the image here [default: its name there]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replace an image of the same name
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: ServerArguments,
}

/// Bring all of an attached image here
#[derive(Args)]
pub struct PrefetchArguments {
    /// An image; VOLUME@SNAPSHOT; or volume:NAME
    what: String,
    /// Bytes a second at most
    #[arg(long, value_name = "SIZE")]
    rate: Option<ByteSize>,
}

/// Forget an object store of which images were attached; refused while something needs it
#[derive(Args)]
pub struct DetachArguments {
    /// The object store: s3://BUCKET/PREFIX
    place: S3Url,
    /// The server, where there are two of that address
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Forget it although something is needed that only it holds: that counts as lost
    #[arg(long)]
    force: bool,
}

#[derive(Subcommand)]
pub enum RemoteCommand {
    /// List the images of an object store; without an address, the object stores of which images are attached
    Ls {
        /// The object store: s3://BUCKET/PREFIX
        place: Option<S3Url>,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Remove images of an object store; those that are attached anywhere lose what was not read yet
    Rm {
        /// The object store: s3://BUCKET/PREFIX
        place: S3Url,
        #[arg(required = true)]
        images: Vec<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Give back the room of what no image of an object store needs, in two runs: one lists it, a later one removes it
    Gc {
        /// The object store: s3://BUCKET/PREFIX
        place: S3Url,
        /// How long something has to be listed before it is removed; pushes must not take longer
        #[arg(long, value_name = "HOURS", default_value_t = remote::GRACE_DEFAULT.as_secs() / 3600, value_parser = clap::value_parser!(u64).range(..=24 * 365))]
        grace: u64,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArguments,
    },
}

/// A variable of the environment that says something.
fn variable(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn credentials() -> Option<Credentials> {
    Some(Credentials {
        access_key: variable(&["AWS_ACCESS_KEY_ID"])?,
        secret_key: variable(&["AWS_SECRET_ACCESS_KEY"])?,
        session_token: variable(&["AWS_SESSION_TOKEN"]),
    })
}

impl ServerArguments {
    fn options(&self, place: &S3Url) -> RemoteOptions {
        let endpoint = self.endpoint.clone().or_else(|| variable(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]));
        let region = self.region.clone().or_else(|| variable(&["AWS_REGION", "AWS_DEFAULT_REGION"]));
        let address = RemoteAddress {
            url: place.0.clone(),
            endpoint,
            region: region.unwrap_or_else(|| REGION_DEFAULT.to_owned()),
            patience: Duration::from_secs(self.patience),
        };
        RemoteOptions { address, credentials: credentials() }
    }

    fn open(&self, place: &S3Url) -> Result<Remote> {
        let options = self.options(place);
        let remote = Remote::open(&options)?;
        if options.credentials.is_none() {
            return Err(RemoteError::NoCredentials { url: place.0.clone() }.into());
        }
        Ok(remote)
    }
}

/// How this process reaches the remote stores that the store in a folder has attached images of.
pub fn attached_options(store: &Path) -> Result<Vec<RemoteOptions>> {
    let credentials = credentials();
    let with = |address| RemoteOptions { address, credentials: credentials.clone() };
    Ok(remote::attached(store)?.into_iter().map(with).collect())
}

/// Has a store look into the remote stores of which it has attached images for what it does not hold.
pub fn resume(store: &Arc<Store>) -> Result<Vec<Attached>> {
    let remotes = attached_options(store.folder())?.into_iter().filter_map(|options| {
        // What is local can be had all the same.
        let opened =
            Remote::open(&options).inspect_err(|error| tracing::warn!(%error, "an attached store is passed over"));
        Some(opened.ok()?.resume(store))
    });
    Ok(remotes.collect())
}

/// Carries out `polder store push` to an object store.
pub fn push(
    store: &Arc<Store>,
    what: &NodeRef,
    place: &S3Url,
    server: &ServerArguments,
    options: &TransferOptions,
) -> Result<()> {
    let remote = server.open(place)?;
    let mut progress = Progress::new();
    let pushed = remote.push(store, what, options, &mut |step| progress.show(step))?;
    progress.finish();
    println!("{what} is image {} there: {} records, {}", options.image, pushed.records, rough(pushed.record_bytes));
    Ok(())
}

/// Carries out `polder store pull` from an object store.
pub fn pull(
    store: &Arc<Store>,
    what: &NodeRef,
    place: &S3Url,
    server: &ServerArguments,
    options: &TransferOptions,
) -> Result<()> {
    let NodeRef::Image(image) = what else { bail!("an object store holds images: {what} is none") };
    let remote = server.open(place)?;
    let mut progress = Progress::new();
    remote.pull(store, image, options, &mut |step| progress.show(step))?;
    progress.finish();
    println!("{what} is image {} here", options.image);
    Ok(())
}

/// Carries out `polder store attach`.
pub fn attach(store: &Arc<Store>, arguments: &AttachArguments) -> Result<ExitCode> {
    let name = arguments.name.as_ref().unwrap_or(&arguments.image);
    let replace = if arguments.force { Replace::Yes } else { Replace::No };
    let options = TransferOptions { replace, ..TransferOptions::new(name) };
    let attached = arguments.server.open(&arguments.place)?.attach(store, &arguments.image, &options)?;
    println!(
        "Image {name} is attached: {} came; the rest comes when it is read, or with `polder store prefetch {name}`",
        rough(attached.fetched_bytes())
    );
    Ok(ExitCode::SUCCESS)
}

/// Carries out `polder store prefetch`.
pub fn prefetch(store: &Arc<Store>, remotes: &[Attached], arguments: &PrefetchArguments) -> Result<ExitCode> {
    let what = node_ref(&arguments.what).0;
    let mut candidates = Vec::new();
    for attached in remotes {
        let is_candidate = match &what {
            NodeRef::Image(image) => attached.has(image)?,
            _ => true,
        };
        candidates.extend(is_candidate.then_some(attached));
    }
    if candidates.is_empty() {
        // It may not be there at all.
        if let NodeRef::Image(image) = &what {
            store.image(image)?;
        }
        println!("Nothing of {what} is elsewhere");
        return Ok(ExitCode::SUCCESS);
    }
    let mut progress = Progress::new();
    let mut outcome = Ok(());
    let mut fetched = 0;
    for attached in candidates {
        outcome = attached.prefetch(&what, arguments.rate.map(|rate| rate.0), &mut |step| progress.show(step));
        fetched += attached.fetched_bytes();
        match &outcome {
            // It may be in the next one.
            Err(RemoteError::Store(error)) if matches!(**error, StoreError::Missing { .. }) => {}
            _ => break,
        }
    }
    progress.finish();
    outcome?;
    println!("All of {what} is here: {} came", rough(fetched));
    Ok(ExitCode::SUCCESS)
}

/// Carries out `polder store detach`.
pub fn detach(store: &Arc<Store>, arguments: &DetachArguments) -> Result<ExitCode> {
    let url = &arguments.place.0;
    let is_meant = |address: &RemoteAddress| {
        address.url == *url && (arguments.endpoint.is_none() || arguments.endpoint == address.endpoint)
    };
    let found: Vec<RemoteAddress> = remote::attached(store.folder())?.into_iter().filter(is_meant).collect();
    let address = match found.as_slice() {
        [address] => address,
        [] => bail!("no image of {url} is attached (`polder store remote ls` lists what is)"),
        _ => bail!("images of several servers are attached under {url}: name one with --endpoint"),
    };
    let owners = remote::needed_by(store, address)?;
    if !owners.is_empty() && !arguments.force {
        let named = owners.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        let more = if owners.len() > NAMED_MAX { " and others" } else { "" };
        bail!("{named}{more} would lose what is only there (`polder store prefetch` brings it here)");
    }
    remote::detach(store, address)?;
    Ok(ExitCode::SUCCESS)
}

/// Carries out `polder store remote ...`.
pub fn remote(store: &Arc<Store>, command: &RemoteCommand) -> Result<ExitCode> {
    match command {
        RemoteCommand::Ls { place: None, json, .. } => list_attached(store, *json)?,
        RemoteCommand::Ls { place: Some(place), json, server } => list(&server.open(place)?, *json)?,
        RemoteCommand::Rm { place, images, server } => {
            let remote = server.open(place)?;
            images.iter().try_for_each(|image| remote.remove(image))?;
        }
        RemoteCommand::Gc { place, grace, json, server } => {
            collect(store, &server.open(place)?, Duration::from_secs(grace * 3600), *json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list_attached(store: &Arc<Store>, as_json: bool) -> Result<()> {
    let addresses = remote::attached(store.folder())?;
    if as_json {
        let values = addresses.iter().map(|address| {
            json!({
                "url": address.url, "endpoint": address.endpoint, "region": address.region,
                "patience_s": address.patience.as_secs(),
            })
        });
        println!("{:#}", values.collect::<serde_json::Value>());
        return Ok(());
    }
    println!("{:<40} {:<30} {:<12} PATIENCE", "ADDRESS", "SERVER", "REGION");
    for address in addresses {
        let server = address.endpoint.as_deref().unwrap_or("-");
        println!("{:<40} {server:<30} {:<12} {} s", address.url, address.region, address.patience.as_secs());
    }
    Ok(())
}

fn list(remote: &Remote, as_json: bool) -> Result<()> {
    let images = remote.list()?;
    if as_json {
        let values = images.iter().map(|image| {
            json!({
                "name": image.name, "node": image.node.to_string(),
                "created_utc": utc(image.created_ns / 1_000_000_000),
            })
        });
        println!("{:#}", values.collect::<serde_json::Value>());
        return Ok(());
    }
    println!("{:<30} {:<20} NODE", "NAME", "PUSHED");
    for image in images {
        let node = &image.node.to_string()[..16];
        println!("{:<30} {:<20} {node}", image.name, utc(image.created_ns / 1_000_000_000));
    }
    Ok(())
}

fn collect(store: &Arc<Store>, remote: &Remote, grace: Duration, as_json: bool) -> Result<()> {
    let mut progress = Progress::new();
    let collected = remote.collect(store, grace, &mut |step| progress.show(step))?;
    progress.finish();
    if as_json {
        let value = json!({
            "segments": collected.segments, "needed_segments": collected.needed_segments, "listed": collected.listed,
            "revived": collected.revived, "removed_segments": collected.removed,
            "removed_bytes": collected.removed_bytes,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!(
        "{} given back: {} segments removed; {} are needed, {} are listed from now on, {} are needed again",
        rough(collected.removed_bytes),
        collected.removed,
        collected.needed_segments,
        collected.listed,
        collected.revived
    );
    Ok(())
}

/// What a store can have from elsewhere, if there is anything.
pub fn elsewhere(store: &Store) -> Result<Option<Elsewhere>> {
    match remote::attached(store.folder())?.is_empty() {
        true => Ok(None),
        false => Ok(Some(Elsewhere::load(store)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_store_is_a_bucket_and_perhaps_a_prefix() {
        assert_eq!("s3://images".parse(), Ok(S3Url("s3://images".to_owned())));
        assert_eq!("s3://images/prod/".parse(), Ok(S3Url("s3://images/prod".to_owned())));
        for text in ["", "s3://", "s3:///x", "images", "http://images"] {
            assert!(text.parse::<S3Url>().is_err(), "{text}");
        }
    }
}
