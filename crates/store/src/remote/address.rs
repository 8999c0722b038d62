//! Where a remote store is, and who we are there. The first is kept beside a store that has images of it attached; the second never.

use std::path::PathBuf;
use std::time::Duration;

use super::error::RemoteError;
use crate::store::Store;

/// How long a call tries, unless another time is asked for.
pub const PATIENCE_DEFAULT: Duration = Duration::from_secs(30);
/// The longest time that a call tries.
pub const PATIENCE_MAX: Duration = Duration::from_secs(24 * 3600);
/// The region of servers that have none.
pub const REGION_DEFAULT: &str = "us-east-1";

/// The folder of a store that holds what is known of remote stores, in a folder for each.
pub(super) const FOLDER: &str = "remotes";
/// The file in it that says which remote store it is.
pub(super) const ADDRESS_FILE: &str = "url";

const ENDPOINT: &str = "endpoint";
const REGION: &str = "region";
const PATIENCE_S: &str = "patience_s";

/// Where a remote store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteAddress {
    /// `s3://BUCKET/PREFIX`.
    pub url: String,
    /// The server, as `http://HOST:PORT`; Amazon's without.
    pub endpoint: Option<String>,
    pub region: String,
    /// How long a call tries to reach a server that does not answer.
    pub patience: Duration,
}

/// Who we are at a remote store.
#[derive(Clone)]
pub struct Credentials {
    pub access_key: String,
    pub secret_key: String,
    /// Of credentials that end after a while.
    pub session_token: Option<String>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// A remote store as a process reaches it. Without credentials only what is known of it here can be had.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    pub address: RemoteAddress,
    pub credentials: Option<Credentials>,
}

impl RemoteAddress {
    /// A remote store at Amazon's server, unless the fields are changed.
    pub fn new(url: impl Into<String>) -> Self {
        let region = REGION_DEFAULT.to_owned();
        RemoteAddress { url: url.into(), endpoint: None, region, patience: PATIENCE_DEFAULT }
    }

    /// The bucket, and the prefix in it.
    pub fn parts(&self) -> Result<(&str, &str), RemoteError> {
        let wrong = |what: &str| RemoteError::Address { url: self.url.clone(), what: what.to_owned() };
        let rest = self.url.strip_prefix("s3://").ok_or_else(|| wrong("it has to begin with s3://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if self.url.contains(char::is_control) {
            return Err(wrong("it holds a control character"));
        }
        if bucket.is_empty() {
            return Err(wrong("it names no bucket"));
        }
        Ok((bucket, prefix.trim_matches('/')))
    }

    /// The folder for what a store knows of it. Two servers may have buckets of one name.
    pub(super) fn folder_in(&self, store: &Store) -> PathBuf {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.url.trim_end_matches('/').as_bytes());
        if let Some(endpoint) = &self.endpoint {
            hasher.update(b"\n").update(endpoint.trim_end_matches('/').as_bytes());
        }
        store.folder().join(FOLDER).join(&hasher.finalize().to_hex()[..32])
    }

    pub(super) fn to_text(&self) -> String {
        let mut text = format!("{}\n", self.url);
        if let Some(endpoint) = &self.endpoint {
            text += &format!("{ENDPOINT} {endpoint}\n");
        }
        text + &format!("{REGION} {}\n{PATIENCE_S} {}\n", self.region, self.patience.as_secs())
    }

    /// The address in a file; lines that a later release added are passed over.
    pub(super) fn from_text(text: &str) -> Self {
        let mut lines = text.lines();
        let mut address = RemoteAddress::new(lines.next().unwrap_or_default());
        for (key, value) in lines.filter_map(|line| line.split_once(' ')) {
            match key {
                ENDPOINT => address.endpoint = Some(value.to_owned()),
                REGION => address.region = value.to_owned(),
                PATIENCE_S => {
                    let seconds = value.parse().map_or(PATIENCE_DEFAULT, Duration::from_secs);
                    address.patience = seconds.min(PATIENCE_MAX);
                }
                _ => {}
            }
        }
        address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_kept_as_text_and_names_a_bucket() {
        let mut address = RemoteAddress::new("s3://images/prod/eu");
        assert_eq!(RemoteAddress::from_text(&address.to_text()), address);
        assert_eq!(RemoteAddress::from_text("s3://images/prod/eu"), address);
        address.endpoint = Some("http://127.0.0.1:3900".to_owned());
        address.region = "garage".to_owned();
        address.patience = Duration::from_secs(5);
        assert_eq!(RemoteAddress::from_text(&(address.to_text() + "later thing\n")), address);
        assert_eq!(address.parts().unwrap(), ("images", "prod/eu"));
        assert_eq!(RemoteAddress::new("s3://images").parts().unwrap(), ("images", ""));
        for url in ["", "images", "s3://", "s3:///prefix", "http://images/x", "s3://images/a\nb"] {
            assert!(RemoteAddress::new(url).parts().is_err(), "{url:?}");
        }
    }

    #[test]
    fn what_is_secret_is_not_shown() {
        let credentials =
            Credentials { access_key: "key".into(), secret_key: "hush".into(), session_token: Some("quiet".into()) };
        let options = RemoteOptions { address: RemoteAddress::new("s3://a"), credentials: Some(credentials) };
        let shown = format!("{options:?}");
        assert!(!shown.contains("hush") && !shown.contains("quiet"), "{shown}");
    }
}
