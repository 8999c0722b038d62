//! The reply to a read with holes, put together in the buffer that was read into.

use super::HOLE_LEN_MIN;
use super::protocol::{DATA_HEAD_LEN_MAX, Form, HOLE_LEN_MAX, Last, Request, data_head, hole};
use std::ops::Range;

/// Writes the heads of the chunks of a read into the buffer, and says which parts of it are to be sent. `holes` lie in `data`, in
/// order, and each has room for a chunk of its own and the head of the next one.
pub(super) fn write_chunks(
    bytes: &mut [u8],
    form: Form,
    request: &Request,
    data: Range<usize>,
    holes: &[Range<usize>],
) -> Vec<Range<usize>> {
    const _: () = assert!(HOLE_LEN_MIN >= HOLE_LEN_MAX + DATA_HEAD_LEN_MAX);
    let offset_of = |at: usize| request.offset + (at - data.start) as u64;
    let mut ranges: Vec<Range<usize>> = Vec::with_capacity(holes.len() + 1);
    let mut at = data.start;
    for index in 0..=holes.len() {
        let hole_range = holes.get(index);
        let data_end = hole_range.map_or(data.end, |hole| hole.start);
        if at < data_end {
            let last = if data_end == data.end { Last::Yes } else { Last::No };
            let head = data_head(form, last, request, offset_of(at), (data_end - at) as u32);
            let start = at - head.len();
            bytes[start..at].copy_from_slice(&head);
            ranges.push(start..data_end);
        }
        let Some(hole_range) = hole_range else { break };
        let last = if hole_range.end == data.end { Last::Yes } else { Last::No };
        let chunk = hole(form, last, request, offset_of(hole_range.start), hole_range.len() as u32);
        let chunk_end = hole_range.start + chunk.len();
        bytes[hole_range.start..chunk_end].copy_from_slice(&chunk);
        match ranges.last_mut().filter(|range| range.end == hole_range.start) {
            Some(range) => range.end = chunk_end,
            None => ranges.push(hole_range.start..chunk_end),
        }
        at = hole_range.end;
    }
    ranges
}
