//! What can go wrong with a remote store, in the words of who asked.

use std::sync::Arc;

use crate::error::StoreError;

/// Why something of a remote store cannot be had or done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RemoteError {
    #[error("{url:?} is no address of a remote store: {what}")]
    Address { url: String, what: String },
    #[error("there are no credentials for {url}")]
    NoCredentials { url: String },
    #[error("there is no bucket {bucket}")]
    NoBucket { bucket: String },
    #[error("the remote store is not in region {region}: {why}")]
    Region { region: String, why: String },
    #[error("the remote store did not answer in {seconds} s when asked for {object}: {why}")]
    Gone { object: String, seconds: u64, why: String },
    #[error("the remote store does not accept the credentials (asked for {object}): {why}")]
    Credentials { object: String, why: String },
    #[error("object {object} is missing from the remote store")]
    Missing { object: String },
    #[error("object {object} of the remote store is damaged: {what}")]
    Damaged { object: String, what: String },
    #[error("object {object} has format {found}, which this release does not know (it knows {known})")]
    UnknownFormat { object: String, found: u32, known: u32 },
    #[error("the remote store names its chunks under another secret")]
    OtherDomain,
    #[error("the remote store has no image {image}")]
    NoImage { image: String },
    #[error("the remote store has an image {image} already")]
    Exists { image: String },
    #[error("image {image} of the remote store needs {name}, which no segment there holds: nothing is removed")]
    Lost { image: String, name: String },
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(Arc<StoreError>),
}

impl From<StoreError> for RemoteError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Remote(error) => error,
            error => RemoteError::Store(Arc::new(error)),
        }
    }
}
