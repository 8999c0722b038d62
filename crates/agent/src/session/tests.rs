//! Sessions over a socket pair, with the programs that every host has.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use polder_basics::agent_protocol::{AgentErrorKind, Command, Decoder, ExitStatus, Message, TerminalSize};

struct Host {
    stream: UnixStream,
    decoder: Decoder,
    session: Option<JoinHandle<()>>,
}

impl Host {
    fn new() -> Self {
        let (stream, agent) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let session = std::thread::spawn(move || super::serve(OwnedFd::from(agent)));
        Host { stream, decoder: Decoder::new(), session: Some(session) }
    }

    fn exec(arguments: &[&str]) -> Self {
        let mut host = Host::new();
        host.send(Message::Exec(command(arguments)));
        host
    }

    fn send(&mut self, message: Message) {
        let mut frame = Vec::new();
        message.encode(&mut frame).unwrap();
        self.stream.write_all(&frame).unwrap();
    }

    fn receive(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(len) => self.decoder.push(&bytes[..len]),
                // The end of a child can interrupt a wait on some hosts.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("the session broke: {error}"),
            }
        }
    }

    /// Everything up to the end: output, errors, the last message.
    fn finish(&mut self) -> (Vec<u8>, Vec<u8>, Option<Message>) {
        let (mut stdout, mut stderr, mut last) = (Vec::new(), Vec::new(), None);
        while let Some(message) = self.receive() {
            match message {
                Message::Stdout(bytes) => stdout.extend(bytes),
                Message::Stderr(bytes) => stderr.extend(bytes),
                other => last = Some(other),
            }
        }
        self.session.take().unwrap().join().unwrap();
        (stdout, stderr, last)
    }
}

fn command(arguments: &[&str]) -> Command {
    Command { arguments: arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect(), ..Command::default() }
}

fn exit(code: u8) -> Option<Message> {
    Some(Message::Exit(ExitStatus::Code(code)))
}

#[test]
fn output_errors_and_status_come_back() {
    let mut host = Host::exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(host.finish(), (b"out\n".to_vec(), b"err\n".to_vec(), exit(7)));
}

#[test]
fn a_signal_that_ends_a_program_is_told() {
    let mut host = Host::exec(&["sh", "-c", "kill -9 $$"]);
    assert_eq!(host.finish().2, Some(Message::Exit(ExitStatus::Signal(9))));
}

#[test]
fn input_reaches_the_program_and_its_end_too() {
    let mut host = Host::exec(&["cat"]);
    host.send(Message::Stdin(b"one ".to_vec()));
    host.send(Message::Stdin(b"two".to_vec()));
    host.send(Message::StdinEnd);
    assert_eq!(host.finish(), (b"one two".to_vec(), Vec::new(), exit(0)));
}

#[test]
fn more_input_than_the_bound_passes_through_unharmed() {
    let mut host = Host::exec(&["sh", "-c", "cat | md5sum; cat"]);
    let sent = vec![b'x'; 32 * 1024];
    let mut writer = host.stream.try_clone().unwrap();
    let feeder = std::thread::spawn(move || {
        let mut frame = Vec::new();
        Message::Stdin(sent).encode(&mut frame).unwrap();
        (0..64).for_each(|_| writer.write_all(&frame).unwrap());
        let mut end = Vec::new();
        Message::StdinEnd.encode(&mut end).unwrap();
        writer.write_all(&end).unwrap();
    });
    let (stdout, _, last) = host.finish();
    feeder.join().unwrap();
    assert_eq!(last, exit(0));
    // md5 of 2 MiB of the letter x, by coreutils.
    let mut expected = std::process::Command::new("sh");
    let output = expected.args(["-c", "head -c 2097152 /dev/zero | tr '\\0' x | md5sum"]).output().unwrap();
    assert_eq!(stdout, output.stdout);
}

#[test]
fn much_output_waits_for_a_slow_host() {
    let mut host = Host::exec(&["head", "-c", "5000000", "/dev/zero"]);
    let (stdout, _, last) = host.finish();
    assert_eq!((stdout.len(), last), (5_000_000, exit(0)));
}

#[test]
fn a_program_left_in_the_background_does_not_hold_the_session() {
    let mut host = Host::exec(&["sh", "-c", "sleep 60 & echo started $!"]);
    let (stdout, _, last) = host.finish();
    assert_eq!(last, exit(0));
    let text = String::from_utf8(stdout).unwrap();
    let pid: i32 = text.trim().strip_prefix("started ").unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_missing_program_and_a_missing_directory_are_told() {
    let mut host = Host::exec(&["/no/such/program"]);
    let Some(Message::Error { kind, text }) = host.finish().2 else { panic!("no error came") };
    assert_eq!(kind, AgentErrorKind::NotFound);
    assert!(text.contains("/no/such/program"), "{text}");
    let mut host = Host::exec(&["/etc/passwd"]);
    let Some(Message::Error { kind, .. }) = host.finish().2 else { panic!("no error came") };
    assert_eq!(kind, AgentErrorKind::NotExecutable);
    let mut host = Host::new();
    host.send(Message::Exec(Command { directory: Some(b"/no/such/place".to_vec()), ..command(&["true"]) }));
    let Some(Message::Error { kind, .. }) = host.finish().2 else { panic!("no error came") };
    assert_eq!(kind, AgentErrorKind::NotFound);
}

#[test]
fn environment_and_directory_are_the_commands() {
    let mut host = Host::new();
    let asked = Command {
        environment: vec![b"COLOUR=blue=green".to_vec()],
        directory: Some(b"/usr".to_vec()),
        ..command(&["sh", "-c", "echo $COLOUR; pwd; env | grep -c CARGO"])
    };
    host.send(Message::Exec(asked));
    assert_eq!(host.finish().0, b"blue=green\n/usr\n0\n");
}

#[test]
fn a_signal_reaches_the_programs_group() {
    let mut host = Host::exec(&["sh", "-c", "echo ready; sleep 60; echo not reached"]);
    assert_eq!(host.receive(), Some(Message::Stdout(b"ready\n".to_vec())));
    host.send(Message::Signal(0));
    host.send(Message::Signal(200));
    host.send(Message::Signal(15));
    assert_eq!(host.finish(), (Vec::new(), Vec::new(), Some(Message::Exit(ExitStatus::Signal(15)))));
}

#[test]
fn a_host_that_goes_away_takes_its_program_along() {
    let mut host = Host::exec(&["sh", "-c", "echo $$; exec sleep 60"]);
    let Some(Message::Stdout(bytes)) = host.receive() else { panic!("no output came") };
    let pid: i32 = String::from_utf8(bytes).unwrap().trim().parse().unwrap();
    let session = host.session.take().unwrap();
    drop(host);
    session.join().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    assert!(rustix::process::test_kill_process(pid).is_err());
}

#[test]
fn a_terminal_is_a_terminal_of_the_asked_size() {
    let mut host = Host::new();
    let terminal = Some(TerminalSize { rows: 33, columns: 77 });
    host.send(Message::Exec(Command {
        terminal,
        ..command(&["sh", "-c", "tty >/dev/null && stty size; read line; echo got $line"])
    }));
    host.send(Message::Stdin(b"word\n".to_vec()));
    let (stdout, _, last) = host.finish();
    let text = String::from_utf8(stdout).unwrap();
    assert!(text.contains("33 77") && text.contains("got word"), "{text}");
    assert_eq!(last, exit(0));
}

#[test]
fn a_ping_is_answered() {
    let mut host = Host::new();
    host.send(Message::Ping);
    assert_eq!(host.receive(), Some(Message::Pong));
}

#[test]
fn hostile_frames_end_the_session_with_a_reason() {
    for bytes in [&[9u8, 1, 0, 0, 0, 0, 0, 0][..], &[1, 77, 0, 0, 0, 0, 0, 0], &[1, 1, 0, 0, 0xff, 0xff, 0xff, 0xff]] {
        let mut host = Host::new();
        host.stream.write_all(bytes).unwrap();
        let last = host.finish().2;
        assert!(matches!(last, Some(Message::Error { kind: AgentErrorKind::BadRequest, .. })), "{last:?}");
    }
    let mut host = Host::new();
    host.send(Message::Stdin(b"too early".to_vec()));
    assert!(matches!(host.finish().2, Some(Message::Error { kind: AgentErrorKind::BadRequest, .. })));
}

#[test]
fn a_second_program_in_one_session_is_refused_and_the_first_ends() {
    let mut host = Host::exec(&["sleep", "60"]);
    host.send(Message::Exec(command(&["true"])));
    assert!(matches!(host.finish().2, Some(Message::Error { kind: AgentErrorKind::BadRequest, .. })));
}
