//! Writes the archive that a kernel unpacks as its first root file system, in cpio's format "newc".
//!
//! [The kernel's documentation][format] defines the format. The program `cpio` would need a staging
//! folder, and root for the device node of the console.
//!
//! [format]: https://docs.kernel.org/driver-api/early-userspace/buffer-format.html

/// An archive that grows entry by entry. A folder must be added before its contents.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Archive {
    pub(super) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file that any user may read and run.
    pub(super) fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, FILE | 0o755, (0, 0), contents);
    }

    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        self.inodes += 1;
        // Names are relative to the root. Their size includes the NUL at the end.
        let name = path.trim_start_matches('/');
        let fields = [
            self.inodes,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // modification time
            u32::try_from(contents.len()).unwrap_or(u32::MAX),
            0, // device of the file, major
            0, // and minor
            major,
            minor,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0, // checksum, which this format does not use
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    /// Pads to a multiple of four bytes, where a header with its name ends, and the contents.
    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_entry_is_a_header_a_name_and_contents_each_padded() {
        let mut archive = Archive::default();
        archive.file("/ab", b"hello");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"07070100000001000081ed"));
        // 110 bytes of header, "ab\0", padding to 116, five bytes, padding to 124, then the
        // trailer.
        assert_eq!(&bytes[110..116], b"ab\0\0\0\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
