//! Archives made by hand, entry by entry.

/// An archive that is being put together.
#[derive(Default)]
pub(super) struct Archive(pub(super) Vec<u8>);

/// The fields of one entry.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    pub(super) path: &'a str,
    pub(super) kind: u8,
    pub(super) mode: u32,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) time: u64,
    pub(super) link: &'a str,
    pub(super) device: (u32, u32),
    pub(super) pax: &'a [(&'a str, &'a [u8])],
}

impl Default for Fields<'_> {
    fn default() -> Self {
        Fields {
            path: "",
            kind: b'0',
            mode: 0o644,
            user: 0,
            group: 0,
            time: 1_000_000_000,
            link: "",
            device: (0, 0),
            pax: &[],
        }
    }
}

impl Archive {
    pub(super) fn header(&mut self, fields: &Fields<'_>, len: u64) -> &mut Self {
        let mut record = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, fields.path.as_bytes());
        put(100, format!("{:07o}", fields.mode).as_bytes());
        put(108, format!("{:07o}", fields.user).as_bytes());
        put(116, format!("{:07o}", fields.group).as_bytes());
        put(124, format!("{len:011o}").as_bytes());
        put(136, format!("{:011o}", fields.time).as_bytes());
        put(148, b"        ");
        put(156, &[fields.kind]);
        put(157, fields.link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", fields.device.0).as_bytes());
        put(337, format!("{:07o}", fields.device.1).as_bytes());
        let sum: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
        record[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&record);
        self
    }

    pub(super) fn content(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// One entry with its extended header, if it needs one.
    pub(super) fn add(&mut self, fields: &Fields<'_>, content: &[u8]) -> &mut Self {
        if !fields.pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in fields.pax {
                let rest = 3 + key.len() + value.len();
                let mut len = rest + 1;
                while len != rest + len.to_string().len() {
                    len = rest + len.to_string().len();
                }
                records.extend_from_slice(format!("{len} {key}=").as_bytes());
                records.extend_from_slice(value);
                records.push(b'\n');
            }
            self.header(&Fields { path: "pax", kind: b'x', ..Fields::default() }, records.len() as u64)
                .content(&records);
        }
        self.header(fields, content.len() as u64).content(content)
    }

    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.add(&Fields { path, ..Fields::default() }, content)
    }

    pub(super) fn directory(&mut self, path: &str) -> &mut Self {
        self.add(&Fields { path, kind: b'5', mode: 0o755, ..Fields::default() }, b"")
    }

    pub(super) fn link(&mut self, path: &str, kind: u8, link: &str) -> &mut Self {
        self.add(&Fields { path, kind, link, mode: 0o777, ..Fields::default() }, b"")
    }

    pub(super) fn end(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.0);
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}
