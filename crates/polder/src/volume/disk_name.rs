//! A volume, or a snapshot of it, as commands name it.

use std::str::FromStr;

/// `VOLUME` or `VOLUME@SNAPSHOT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskName {
    pub volume: String,
    pub snapshot: Option<String>,
}

impl FromStr for DiskName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (volume, snapshot) = match text.split_once('@') {
            Some((volume, snapshot)) => (volume, Some(snapshot)),
            None => (text, None),
        };
        if volume.is_empty() || snapshot == Some("") {
            return Err("write VOLUME or VOLUME@SNAPSHOT".to_owned());
        }
        Ok(DiskName { volume: volume.to_owned(), snapshot: snapshot.map(str::to_owned) })
    }
}

impl std::fmt::Display for DiskName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
            None => f.write_str(&self.volume),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_volume_or_a_snapshot_of_it() {
        let disk: DiskName = "web@monday".parse().unwrap();
        assert_eq!((disk.volume.as_str(), disk.snapshot.as_deref()), ("web", Some("monday")));
        assert_eq!(disk.to_string(), "web@monday");
        assert_eq!("web".parse::<DiskName>().unwrap().snapshot, None);
        for text in ["", "@", "@x", "x@"] {
            assert!(text.parse::<DiskName>().is_err(), "{text}");
        }
    }
}
