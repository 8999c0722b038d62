//! Options with a form of their own.

use std::path::PathBuf;

use polder_basics::ByteSize;
use polder_vmm::{
    CODE_CACHE_BYTES_MAX, CODE_CACHE_BYTES_MIN, DiskAccess, DiskConfig, NetConfig, RAM_BYTES_MAX, RAM_BYTES_MIN,
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
    Ok(DiskConfig { path: PathBuf::from(path), access })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_writable_unless_it_says_ro() {
        let disk = parse_disk("a,b.raw").unwrap();
        assert_eq!((disk.path, disk.access), (PathBuf::from("a,b.raw"), DiskAccess::ReadWrite));
        let disk = parse_disk("disk.raw,ro").unwrap();
        assert_eq!((disk.path, disk.access), (PathBuf::from("disk.raw"), DiskAccess::ReadOnly));
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
    fn a_code_cache_outside_the_bounds_is_refused() {
        assert_eq!(parse_code_cache("1M").unwrap().0, 1 << 20);
        for text in ["1023K", "2G", "1048577", "big"] {
            assert!(parse_code_cache(text).is_err(), "{text}");
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
