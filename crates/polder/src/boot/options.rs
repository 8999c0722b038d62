//! Options with a form of their own.

use std::path::PathBuf;

use polder_basics::ByteSize;
use polder_vmm::{
    CODE_CACHE_BYTES_MAX, CODE_CACHE_BYTES_MIN, DiskAccess, DiskConfig, DiskSource, GdbConfig, GdbPlace, GdbStart,
    NetConfig, RAM_BYTES_MAX, RAM_BYTES_MIN,
};

/// Interface names have at most this many bytes (Linux, IFNAMSIZ less the NUL).
const INTERFACE_NAME_LEN_MAX: usize = 15;

/// `FILE` or `FILE,ro`. Only these two endings mean anything, so a file name may hold commas.
pub fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let (path, access) = match text.strip_suffix(",ro") {
        Some(path) => (path, DiskAccess::ReadOnly),
        None => (text, DiskAccess::ReadWrite),
    };
    if path.is_empty() {
        return Err("a disk is FILE or FILE,ro".to_owned());
    }
    Ok(DiskConfig { source: DiskSource::File(PathBuf::from(path)), access })
}

/// `NAME` or `NAME,ro`.
pub fn parse_volume(text: &str) -> Result<(String, DiskAccess), String> {
    match text.strip_suffix(",ro") {
        Some("") => Err("a volume is NAME or NAME,ro".to_owned()),
        Some(name) => Ok((name.to_owned(), DiskAccess::ReadOnly)),
        None if text.is_empty() => Err("a volume is NAME or NAME,ro".to_owned()),
        None => Ok((text.to_owned(), DiskAccess::ReadWrite)),
    }
}

/// A size that a machine's memory can have.
pub fn parse_memory(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error: polder_basics::ParseSizeError| error.to_string())?;
    if !(RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&size.0) {
        return Err(format!("a machine has {} to {} of memory", ByteSize(RAM_BYTES_MIN), ByteSize(RAM_BYTES_MAX)));
    }
    if !size.0.is_multiple_of(4096) {
        return Err("memory comes in whole pages of 4 KiB".to_owned());
    }
    Ok(size)
}

/// A guest address in hexadecimal, with or without `0x`.
pub fn parse_address(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16)
        .map_err(|_| "an address is a hexadecimal number of up to 16 digits".to_owned())
}

/// What the engine takes where nobody chose: a test compares them.
pub const CODE_CACHE_DEFAULT: &str = "128M";

/// A size that a code cache can have.
pub fn parse_code_cache(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error: polder_basics::ParseSizeError| error.to_string())?;
    let (min, max) = (CODE_CACHE_BYTES_MIN as u64, CODE_CACHE_BYTES_MAX as u64);
    if !(min..=max).contains(&size.0) {
        return Err(format!("a code cache has {} to {}", ByteSize(min), ByteSize(max)));
    }
    if !size.0.is_multiple_of(4096) {
        return Err("memory comes in whole pages of 4 KiB".to_owned());
    }
    Ok(size)
}

/// `none` or `tap=NAME`.
pub fn parse_net(text: &str) -> Result<NetConfig, String> {
    match (text, text.strip_prefix("tap=")) {
        ("none", _) => Ok(NetConfig::None),
        (_, Some(name)) if !name.is_empty() && name.len() <= INTERFACE_NAME_LEN_MAX && !name.contains(['/', ' ']) => {
            Ok(NetConfig::Tap(name.to_owned()))
        }
        (_, Some(_)) => Err(format!("an interface's name has 1 to {INTERFACE_NAME_LEN_MAX} characters")),
        _ => Err("write none, or tap=NAME with the name of a TAP interface".to_owned()),
    }
}

/// `PORT` or `SOCKET`, and `,wait`. A number is a port; a path has no colon unless it has a slash too, so that no `HOST:PORT` becomes a file.
pub fn parse_gdb(text: &str) -> Result<GdbConfig, String> {
    let (place, start) = match text.strip_suffix(",wait") {
        Some(place) => (place, GdbStart::WithGdb),
        None => (text, GdbStart::AtOnce),
    };
    let is_number = !place.is_empty() && place.bytes().all(|byte| byte.is_ascii_digit());
    let place = match place.parse() {
        Ok(port @ 1..) if is_number => GdbPlace::Port(port),
        _ if is_number => return Err("a port is a number from 1 to 65535".to_owned()),
        _ if place.is_empty() || place.contains(':') && !place.contains('/') => {
            return Err("write a port of 127.0.0.1 as a number, or the path of a Unix socket".to_owned());
        }
        _ => GdbPlace::Socket(PathBuf::from(place)),
    };
    Ok(GdbConfig { place, start })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_writable_unless_it_says_ro() {
        let disk = parse_disk("a,b.raw").unwrap();
        assert_eq!((disk.source, disk.access), (DiskSource::File("a,b.raw".into()), DiskAccess::ReadWrite));
        let disk = parse_disk("disk.raw,ro").unwrap();
        assert_eq!((disk.source, disk.access), (DiskSource::File("disk.raw".into()), DiskAccess::ReadOnly));
        assert!(parse_disk(",ro").is_err());
    }

    #[test]
    fn memory_outside_the_bounds_is_refused() {
        assert_eq!(parse_memory("64M").unwrap().0, 64 << 20);
        assert_eq!(parse_memory("16G").unwrap().0, 16 << 30);
        for text in ["63M", "1M", "17G", "64T", "lots", "67108865"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_are_hexadecimal() {
        assert_eq!(parse_address("0xffffffff81000000"), Ok(0xffff_ffff_8100_0000));
        assert_eq!(parse_address("1f"), Ok(0x1f));
        assert!(parse_address("main").is_err() && parse_address("").is_err());
    }

    #[test]
    fn the_code_cache_has_the_engines_size_if_nothing_is_said() {
        assert_eq!(parse_code_cache(CODE_CACHE_DEFAULT).unwrap().0 as usize, polder_vmm::CODE_CACHE_BYTES_DEFAULT);
    }

    #[test]
    fn a_code_cache_outside_the_bounds_is_refused() {
        assert_eq!(parse_code_cache("1M").unwrap().0, 1 << 20);
        for text in ["1023K", "2G", "1048577", "big"] {
            assert!(parse_code_cache(text).is_err(), "{text}");
        }
    }

    #[test]
    fn gdb_has_a_port_or_a_socket() {
        let gdb = |text: &str| parse_gdb(text).map(|gdb| (gdb.place, gdb.start));
        assert_eq!(gdb("1234"), Ok((GdbPlace::Port(1234), GdbStart::AtOnce)));
        assert_eq!(gdb("1234,wait"), Ok((GdbPlace::Port(1234), GdbStart::WithGdb)));
        assert_eq!(gdb("./a:1,wait"), Ok((GdbPlace::Socket(PathBuf::from("./a:1")), GdbStart::WithGdb)));
        assert_eq!(gdb("gdb.sock"), Ok((GdbPlace::Socket(PathBuf::from("gdb.sock")), GdbStart::AtOnce)));
        for text in ["", ",wait", "0", "65536", "99999999999999999999", ":1234", "localhost:1234", "tcp::1234"] {
            assert!(parse_gdb(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nets_are_none_or_a_tap() {
        assert_eq!(parse_net("none"), Ok(NetConfig::None));
        assert_eq!(parse_net("tap=tap0"), Ok(NetConfig::Tap("tap0".to_owned())));
        for text in ["", "tap", "tap=", "tap=../x", "tap=waytoolonganame0", "user"] {
            assert!(parse_net(text).is_err(), "{text}");
        }
    }
}
