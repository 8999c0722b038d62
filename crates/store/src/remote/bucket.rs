//! Objects by their paths: an S3-compatible server, asked by a thread of its own.
//!
//! Calls wait. What may be gone in a moment (no connection, an overloaded server) is tried again until the patience ends; wrong
//! credentials, a bucket that is not there and objects that are not there are said at once. The thread and the connection come with
//! the first call: a store with attached images costs nothing as long as nothing of them is missing.

use std::ops::Range;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::address::{RemoteAddress, RemoteOptions};
use super::error::RemoteError;

/// The first pause before another try, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes a second that come or go at least, once a server answers: slower ones count as not answering.
const RATE_MIN: u64 = 64 << 10;

/// The longest object that is read whole: an index of sixteen segments that hold nothing but the smallest records.
const WHOLE_LEN_MAX: u64 = 64 << 20;

/// An object as lists show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    /// Without the folders before it.
    pub name: String,
    pub bytes: u64,
    pub modified_ms: i64,
}

/// Why a call came to nothing.
#[derive(Debug)]
pub(super) enum BucketError {
    NotFound,
    Credentials(String),
    /// It may go better another time.
    Again(String),
    /// It will go no better.
    Final(RemoteError),
}

type Outcome<T> = Result<T, BucketError>;

/// Where objects are.
pub(super) trait Bucket: Send + Sync {
    fn put(&self, path: &str, bytes: Vec<u8>) -> Outcome<()>;
    fn get(&self, path: &str) -> Outcome<Vec<u8>>;
    /// Up to the object's end, if the range goes beyond.
    fn get_range(&self, path: &str, range: Range<u64>) -> Outcome<Vec<u8>>;
    fn remove(&self, path: &str) -> Outcome<()>;
    /// The objects of a folder.
    fn list(&self, folder: &str) -> Outcome<Vec<Object>>;
}

/// A bucket below a prefix, asked with patience.
pub(super) struct Client {
    bucket: Box<dyn Bucket>,
    prefix: String,
    patience: Duration,
}

impl Client {
    pub fn new(bucket: Box<dyn Bucket>, prefix: &str, patience: Duration) -> Self {
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Client { bucket, prefix, patience }
    }

    fn with_patience<T>(&self, path: &str, act: impl Fn(&str) -> Outcome<T>) -> Result<T, RemoteError> {
        let object = format!("{}{path}", self.prefix);
        let end = Instant::now() + self.patience;
        let mut pause = PAUSE_MIN;
        loop {
            match act(&object) {
                Ok(value) => return Ok(value),
                Err(BucketError::NotFound) => return Err(RemoteError::Missing { object }),
                Err(BucketError::Credentials(why)) => return Err(RemoteError::Credentials { object, why }),
                Err(BucketError::Final(error)) => return Err(error),
                Err(BucketError::Again(why)) if Instant::now() + pause >= end => {
                    return Err(RemoteError::Gone { object, seconds: self.patience.as_secs(), why });
                }
                Err(BucketError::Again(why)) => {
                    tracing::debug!(object, why, "the remote store is asked again");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<(), RemoteError> {
        self.with_patience(path, |path| self.bucket.put(path, bytes.to_vec()))
    }

    pub fn get(&self, path: &str) -> Result<Vec<u8>, RemoteError> {
        self.with_patience(path, |path| self.bucket.get(path))
    }

    /// The object, if there is one.
    pub fn find(&self, path: &str) -> Result<Option<Vec<u8>>, RemoteError> {
        match self.get(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(RemoteError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn get_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>, RemoteError> {
        self.with_patience(path, |path| self.bucket.get_range(path, range.clone()))
    }

    /// Removes an object; it may be gone already.
    pub fn remove(&self, path: &str) -> Result<(), RemoteError> {
        match self.with_patience(path, |path| self.bucket.remove(path)) {
            Err(RemoteError::Missing { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    pub fn list(&self, folder: &str) -> Result<Vec<Object>, RemoteError> {
        self.with_patience(folder, |folder| self.bucket.list(folder))
    }
}

/// A bucket of an S3-compatible server.
pub(super) struct S3 {
    options: RemoteOptions,
    bucket: String,
    connection: OnceLock<Result<Connection, RemoteError>>,
}

struct Connection {
    store: Arc<AmazonS3>,
    handle: Handle,
    /// Its end ends the thread.
    _stop: oneshot::Sender<()>,
}

impl S3 {
    /// The bucket, and the prefix in it, that an address names: `s3://BUCKET/PREFIX`.
    pub fn open(options: &RemoteOptions) -> Result<(Self, String), RemoteError> {
        let (bucket, prefix) = options.address.parts()?;
        let s3 = S3 { options: options.clone(), bucket: bucket.to_owned(), connection: OnceLock::new() };
        Ok((s3, prefix.to_owned()))
    }

    fn connection(&self) -> Outcome<&Connection> {
        let connection = self.connection.get_or_init(|| Connection::new(&self.options, &self.bucket));
        connection.as_ref().map_err(|error| BucketError::Final(error.clone()))
    }

    /// Has the thread of the network do something with the bucket, and waits, as long as the patience and these bytes allow.
    fn wait<T: Send + 'static, F>(&self, bytes: u64, act: impl FnOnce(Arc<AmazonS3>) -> F) -> Outcome<T>
    where
        F: Future<Output = object_store::Result<T>> + Send + 'static,
    {
        let connection = self.connection()?;
        let (send, receive) = mpsc::channel();
        let act = act(connection.store.clone());
        let limit = self.options.address.patience + Duration::from_secs(bytes / RATE_MIN);
        connection.handle.spawn(async move {
            // Nobody may wait any more.
            let _ = send.send(tokio::time::timeout(limit, act).await);
        });
        match receive.recv() {
            Ok(Err(_)) => Err(BucketError::Again(format!("no answer in {} s", limit.as_secs()))),
            Ok(Ok(outcome)) => outcome.map_err(|error| bucket_error(error, &self.options, &self.bucket)),
            Err(_) => Err(BucketError::Again("the thread of the network has ended".to_owned())),
        }
    }
}

impl Connection {
    fn new(options: &RemoteOptions, bucket: &str) -> Result<Self, RemoteError> {
        let RemoteAddress { url, endpoint, region, .. } = &options.address;
        // Without any, the client would ask the network for some.
        let credentials =
            options.credentials.as_ref().ok_or_else(|| RemoteError::NoCredentials { url: url.clone() })?;
        let client = ClientOptions::new()
            .with_allow_http(true)
            .with_connect_timeout(CONNECT_TIMEOUT)
            // How long a call may take depends on what it moves.
            .with_timeout_disabled();
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(region)
            .with_access_key_id(&credentials.access_key)
            .with_secret_access_key(&credentials.secret_key)
            .with_client_options(client)
            // Trying again is ours.
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() });
        if let Some(token) = &credentials.session_token {
            builder = builder.with_token(token);
        }
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let wrong = |error: object_store::Error| RemoteError::Address { url: url.clone(), what: chain(&error) };
        let store = Arc::new(builder.build().map_err(wrong)?);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| RemoteError::Refused(format!("no thread can be had for the network: {error}")))?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        std::thread::Builder::new()
            .name("store-remote".to_owned())
            .spawn(move || {
                // It ends with its sender, without a message.
                let _ = runtime.block_on(stopped);
                runtime.shutdown_background();
            })
            .map_err(|error| RemoteError::Refused(format!("no thread can be had for the network: {error}")))?;
        Ok(Connection { store, handle, _stop: stop })
    }
}

/// How servers say that requests were signed for another region.
const OTHER_REGION: [&str; 3] = ["AuthorizationHeaderMalformed", "PermanentRedirect", "incorrectly configured region"];

fn bucket_error(error: object_store::Error, options: &RemoteOptions, bucket: &str) -> BucketError {
    use object_store::Error;
    // Only the text of the answer tells these from an object that is not there and from a server that is busy.
    let why = chain(&error);
    if why.contains("NoSuchBucket") {
        return BucketError::Final(RemoteError::NoBucket { bucket: bucket.to_owned() });
    }
    if OTHER_REGION.iter().any(|word| why.contains(word)) {
        return BucketError::Final(RemoteError::Region { region: options.address.region.clone(), why });
    }
    match error {
        Error::NotFound { .. } => BucketError::NotFound,
        Error::PermissionDenied { source, .. } | Error::Unauthenticated { source, .. } => {
            BucketError::Credentials(chain(&*source))
        }
        // Refused lists come without a kind of their own; the status is in the text only.
        _ if why.contains("403 Forbidden") || why.contains("401 Unauthorized") => BucketError::Credentials(why),
        _ => BucketError::Again(why),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let more = source.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        cause = source.source();
    }
    text
}

impl Bucket for S3 {
    fn put(&self, path: &str, bytes: Vec<u8>) -> Outcome<()> {
        let path = Path::from(path);
        self.wait(bytes.len() as u64, |store| async move { store.put(&path, bytes.into()).await.map(drop) })
    }

    fn get(&self, path: &str) -> Outcome<Vec<u8>> {
        let at = Path::from(path);
        let found = self.wait(0, |store| async move { store.get(&at).await })?;
        let len = found.meta.size;
        if len > WHOLE_LEN_MAX {
            let (object, what) = (path.to_owned(), format!("it has {len} bytes"));
            return Err(BucketError::Final(RemoteError::Damaged { object, what }));
        }
        self.wait(len, |_| async move { Ok(found.bytes().await?.into()) })
    }

    fn get_range(&self, path: &str, range: Range<u64>) -> Outcome<Vec<u8>> {
        let path = Path::from(path);
        self.wait(range.end - range.start, |store| async move { Ok(store.get_range(&path, range).await?.into()) })
    }

    fn remove(&self, path: &str) -> Outcome<()> {
        let path = Path::from(path);
        self.wait(0, |store| async move { store.delete(&path).await })
    }

    fn list(&self, folder: &str) -> Outcome<Vec<Object>> {
        let path = Path::from(folder);
        let listed = self.wait(0, |store| async move { store.list_with_delimiter(Some(&path)).await })?;
        let object = |meta: object_store::ObjectMeta| {
            Some(Object {
                name: meta.location.filename()?.to_owned(),
                bytes: meta.size,
                modified_ms: meta.last_modified.timestamp_millis(),
            })
        };
        Ok(listed.objects.into_iter().filter_map(object).collect())
    }
}
