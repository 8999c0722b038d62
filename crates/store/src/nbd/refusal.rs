//! Requests that are refused, and why.

use super::PAYLOAD_LEN_MAX;
use super::protocol::{ErrorNumber, Form, Request, command, command_flag};
use crate::disk::{Access, DiskError};

/// A request that was refused: what went wrong, for programs and for people.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub error: ErrorNumber,
    pub message: String,
}

impl Refusal {
    fn new(error: ErrorNumber, message: &str) -> Self {
        Self { error, message: message.to_owned() }
    }
}

impl From<DiskError> for Refusal {
    fn from(error: DiskError) -> Self {
        let number = match &error {
            DiskError::OutOfRange { .. } | DiskError::NoSuchSnapshot { .. } => ErrorNumber::Invalid,
            DiskError::ReadOnly => ErrorNumber::NotPermitted,
            DiskError::NoSpace => ErrorNumber::NoSpace,
            DiskError::Fenced => ErrorNumber::Shutdown,
            DiskError::Io(_) | DiskError::Damaged { .. } => ErrorNumber::InputOutput,
        };
        Self { error: number, message: error.to_string() }
    }
}

/// What decides whether a request makes sense.
pub(super) struct Rules {
    pub form: Form,
    pub access: Access,
    pub capacity_bytes: u64,
    pub has_contexts: bool,
}

impl Rules {
    /// Refuses what is wrong by itself, whatever the disk says.
    pub fn check(&self, request: &Request) -> Result<(), Refusal> {
        let invalid = |message| Err(Refusal::new(ErrorNumber::Invalid, message));
        let flags = match request.command {
            command::READ if self.form != Form::Simple => command_flag::DF,
            command::WRITE if self.form == Form::Extended => command_flag::PAYLOAD_LEN,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => return invalid("this server does not know the command"),
        };
        if request.flags & !(flags | command_flag::FUA) != 0 {
            return invalid("the command does not have such a flag");
        }
        let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly.into());
        }
        let (offset, len) = (request.offset, request.len);
        match request.command {
            command::FLUSH if offset != 0 || len != 0 => return invalid("a flush has no offset and no length"),
            command::BLOCK_STATUS if !self.has_contexts => return invalid("no metadata context was chosen"),
            command::BLOCK_STATUS if len == 0 => return invalid("the range is empty"),
            command::READ if len > u64::from(PAYLOAD_LEN_MAX) && self.form != Form::Simple => {
                return Err(Refusal::new(ErrorNumber::Overflow, "the request is longer than 64 MiB"));
            }
            command::READ | command::WRITE if len > u64::from(PAYLOAD_LEN_MAX) => {
                return invalid("the request is longer than 64 MiB");
            }
            _ => {}
        }
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.capacity_bytes) {
            let error = match request.command {
                command::WRITE | command::WRITE_ZEROES => ErrorNumber::NoSpace,
                _ => ErrorNumber::Invalid,
            };
            return Err(Refusal::new(error, "the request leaves the disk"));
        }
        Ok(())
    }
}
