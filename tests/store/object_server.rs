//! A small S3-compatible server in memory, for one bucket, that can be told to answer nobody for a while.
//!
//! What it knows is what polder asks for: PUT, GET with ranges, lists (version 2), and removal of several objects. It looks at the
//! access key only; that a real server accepts the signatures is shown by the test with garage.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

pub const BUCKET: &str = "images";
pub const ACCESS_KEY: &str = "AKIDTULIP";
pub const SECRET_KEY: &str = "hush-this-is-the-secret-of-the-tests";

/// The largest object that is taken.
const BODY_LEN_MAX: usize = 32 << 20;

#[derive(Default)]
struct State {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    silent: Mutex<bool>,
    changed: Condvar,
    /// Requests that wait for an answer.
    held: AtomicU64,
    sent_bytes: AtomicU64,
    /// What was asked for.
    keys: Mutex<Vec<String>>,
    over: AtomicBool,
}

/// The server, which ends with the test.
pub struct ObjectServer {
    address: SocketAddr,
    state: Arc<State>,
}

impl ObjectServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let state = Arc::new(State::default());
        let for_threads = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = for_threads.clone();
                if state.over.load(Ordering::SeqCst) {
                    return;
                }
                // A client that goes away in the middle ends its own connection.
                std::thread::spawn(move || serve(&state, stream));
            }
        });
        ObjectServer { address, state }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on nobody is answered, or everybody is again.
    pub fn set_silent(&self, silent: bool) {
        *self.state.silent.lock().unwrap() = silent;
        self.state.changed.notify_all();
    }

    /// Requests that wait for an answer.
    pub fn held(&self) -> u64 {
        self.state.held.load(Ordering::SeqCst)
    }

    /// Bytes of objects that were sent.
    pub fn sent_bytes(&self) -> u64 {
        self.state.sent_bytes.load(Ordering::SeqCst)
    }

    /// The keys of objects that were asked for since the last call.
    pub fn take_keys(&self) -> Vec<String> {
        std::mem::take(&mut self.state.keys.lock().unwrap())
    }

    /// Whether an object's key holds that text.
    pub fn has(&self, part: &str) -> bool {
        self.state.objects.lock().unwrap().keys().any(|key| key.contains(part))
    }

    pub fn stored_bytes(&self) -> u64 {
        self.state.objects.lock().unwrap().values().map(|bytes| bytes.len() as u64).sum()
    }
}

impl Drop for ObjectServer {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::SeqCst);
        self.set_silent(false);
        // The listener's thread looks when somebody comes.
        let _ = TcpStream::connect(self.address);
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Answer { status, headers: String::new(), body: body.into() }
    }

    fn error(status: &'static str, code: &str) -> Self {
        Answer::new(
            status,
            format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{code}</Message></Error>"),
        )
    }
}

fn serve(state: &State, stream: TcpStream) {
    let Ok(reading) = stream.try_clone() else { return };
    let (mut reading, mut writing) = (BufReader::new(reading), stream);
    while let Some(request) = receive(&mut reading) {
        wait_for_leave(state);
        if state.over.load(Ordering::SeqCst) {
            return;
        }
        let answer = answer(state, &request);
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Length: {}\r\nETag: \"1\"\r\nLast-Modified: Mon, 23 Nov 2026 12:00:00 GMT\r\n{}\r\n",
            answer.status,
            answer.body.len(),
            answer.headers
        );
        state.sent_bytes.fetch_add(answer.body.len() as u64, Ordering::SeqCst);
        if writing.write_all(head.as_bytes()).and_then(|()| writing.write_all(&answer.body)).is_err() {
            return;
        }
    }
}

fn wait_for_leave(state: &State) {
    let mut silent = state.silent.lock().unwrap();
    if *silent {
        state.held.fetch_add(1, Ordering::SeqCst);
        while *silent && !state.over.load(Ordering::SeqCst) {
            silent = state.changed.wait(silent).unwrap();
        }
        state.held.fetch_sub(1, Ordering::SeqCst);
    }
}

fn receive(reading: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reading.read_line(&mut line).ok().filter(|&len| len > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reading.read_line(&mut line).ok().filter(|&len| len > 0)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => drop(headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let len = headers.get("content-length").map_or(Some(0), |len| len.parse().ok())?;
    let mut body = vec![0; Some(len).filter(|&len| len <= BODY_LEN_MAX)?];
    reading.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Some(Request { method, path: decoded(path), query: query.to_owned(), headers, body })
}

/// Text with its `%XX` as the bytes that they stand for.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let code = std::str::from_utf8(behind.get(..2).unwrap_or_default()).unwrap_or_default();
        match u8::from_str_radix(code, 16) {
            Ok(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn answer(state: &State, request: &Request) -> Answer {
    let authorization = request.headers.get("authorization").map_or("", String::as_str);
    if !authorization.contains(&format!("Credential={ACCESS_KEY}/")) {
        return Answer::error("403 Forbidden", "InvalidAccessKeyId");
    }
    let (bucket, key) = request.path[1..].split_once('/').unwrap_or((&request.path[1..], ""));
    if bucket != BUCKET {
        return Answer::error("404 Not Found", "NoSuchBucket");
    }
    state.keys.lock().unwrap().push(key.to_owned());
    let mut objects = state.objects.lock().unwrap();
    match (request.method.as_str(), key) {
        ("GET", "") => list(&objects, &request.query),
        ("GET", key) => match objects.get(key) {
            Some(bytes) => part(bytes, request.headers.get("range").map(String::as_str)),
            None => Answer::error("404 Not Found", "NoSuchKey"),
        },
        ("PUT", key) => {
            objects.insert(key.to_owned(), request.body.clone());
            Answer::new("200 OK", "")
        }
        ("POST", "") => {
            let text = String::from_utf8_lossy(&request.body);
            for key in text.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>")) {
                objects.remove(key.0);
            }
            Answer::new("200 OK", "<?xml version=\"1.0\"?><DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>")
        }
        _ => Answer::error("405 Method Not Allowed", "MethodNotAllowed"),
    }
}

fn part(bytes: &[u8], range: Option<&str>) -> Answer {
    let Some((start, end)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return Answer::new("200 OK", bytes);
    };
    let (start, end) = (start.parse().unwrap_or(0), end.parse().map_or(bytes.len(), |end: usize| end + 1));
    let end = end.min(bytes.len());
    if start >= end {
        return Answer::error("416 Range Not Satisfiable", "InvalidRange");
    }
    let headers = format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
    Answer { status: "206 Partial Content", headers, body: bytes[start..end].to_vec() }
}

fn list(objects: &BTreeMap<String, Vec<u8>>, query: &str) -> Answer {
    let prefix = query.split('&').find_map(|pair| pair.strip_prefix("prefix=")).map(decoded).unwrap_or_default();
    let mut text = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with(&prefix)) {
        text += &format!(
            "<Contents><Key>{key}</Key><LastModified>2026-11-23T12:00:00.000Z</LastModified><ETag>\"1\"</ETag>\
             <Size>{}</Size></Contents>",
            bytes.len()
        );
    }
    Answer::new("200 OK", text + "</ListBucketResult>")
}
