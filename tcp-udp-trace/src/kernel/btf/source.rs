//! Reads BTF: that of the running kernel, or else a file.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

use super::Btf;
use crate::error::{Error, ErrorKind, ResultExt as _};

/// The kernel's description of its own types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// More room than the BTF takes. Unused room costs nothing. When an allocation of up to 32 MiB is
/// freed, glibc raises its threshold for large allocations, and then keeps megabytes that the
/// process does not need any more.
const CAPACITY: usize = 33 << 20;

/// BTF, and the words that name its source in an error.
pub(in crate::kernel) struct Source {
    bytes: Vec<u8>,
    name: String,
    /// The kind of the error of malformed BTF.
    malformed: ErrorKind,
}

impl Source {
    /// Reads the running kernel's BTF. If the kernel has none, reads the file.
    pub(in crate::kernel) fn read(file: Option<&Path>) -> Result<Self, Error> {
        match (read_own(), file) {
            (Ok(bytes), _) => Ok(Self {
                bytes,
                name: VMLINUX.into(),
                malformed: ErrorKind::Unsupported,
            }),
            (Err(source), None) => Err(missing(source)),
            (Err(source), Some(path)) => {
                log::info!("{VMLINUX}: {source}: using {}", path.display());
                let name = format!("btf is {}", path.display());
                let bytes = read_file(path).or_error(
                    ErrorKind::InvalidConfig,
                    format!("{name}: the file cannot be read"),
                )?;
                let malformed = ErrorKind::InvalidConfig;
                Ok(Self {
                    bytes,
                    name,
                    malformed,
                })
            }
        }
    }

    pub(in crate::kernel) fn parse(&self) -> Result<Btf<'_>, Error> {
        Btf::parse(&self.bytes).or_error(
            self.malformed,
            format!("{}: the BTF cannot be read", self.name),
        )
    }
}

/// Makes a source of arbitrary bytes.
#[cfg(any(test, fuzzing))]
impl From<&[u8]> for Source {
    fn from(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.into(),
            name: "test".into(),
            malformed: ErrorKind::Unsupported,
        }
    }
}

/// Reads the running kernel's BTF.
pub(super) fn read_own() -> io::Result<Vec<u8>> {
    let mut btf = Vec::with_capacity(CAPACITY);
    File::open(VMLINUX)?.read_to_end(&mut btf)?;
    Ok(btf)
}

fn missing(source: io::Error) -> Error {
    let (kind, message) = match source.kind() {
        io::ErrorKind::NotFound => (
            ErrorKind::Unsupported,
            "this kernel has no BTF (or /sys is not mounted): give the kernel's BTF in a file \
             (`btf` of the builder, `--btf`), or use a kernel of at least 5.10 built with \
             CONFIG_DEBUG_INFO_BTF=y",
        ),
        io::ErrorKind::PermissionDenied => (
            ErrorKind::Permission,
            "the kernel's BTF may not be read: allow that, or give it in a file (`btf` of the \
             builder, `--btf`)",
        ),
        _ => (ErrorKind::Unsupported, "the kernel's BTF cannot be read"),
    };
    Error::new(kind, format!("{VMLINUX}: {message}")).with_source(source)
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Reads raw BTF, or the section `.BTF` of an ELF file such as `vmlinux`.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut magic = [0; ELF_MAGIC.len()];
    let mut btf = Vec::with_capacity(CAPACITY);
    if file.read_exact_at(&mut magic, 0).is_ok() && magic == *ELF_MAGIC {
        let (offset, size) = section(&file)?;
        btf.resize(size, 0);
        file.read_exact_at(&mut btf, offset)?;
        return Ok(btf);
    }
    // A file without end must not take all memory.
    file.take(CAPACITY as u64).read_to_end(&mut btf)?;
    Ok(btf)
}

/// Returns the position and the size of the section `.BTF` in a 64-bit little-endian ELF file.
///
/// The layout is in [`elf.h`][elf].
///
/// [elf]: https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/elf.h
fn section(file: &File) -> io::Result<(u64, usize)> {
    const HEADER: usize = 64;
    /// `ELFCLASS64`, `ELFDATA2LSB`
    const CLASS_AND_DATA: [u8; 2] = [2, 1];
    const NAME: &[u8] = b".BTF\0";
    let invalid = |message| io::Error::new(io::ErrorKind::InvalidData, message);
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    if header[4..6] != CLASS_AND_DATA {
        return Err(invalid("not a 64-bit little-endian ELF file"));
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let table = word(&header, 40);
    // `e_shnum` and `e_shstrndx`
    let (count, names) = (half(60), half(62));
    let read = |index: u16| {
        let mut section = [0; HEADER];
        let at = table.saturating_add(u64::from(index) * HEADER as u64);
        file.read_exact_at(&mut section, at).map(|()| section)
    };
    // `sh_offset` and `sh_size`
    let names = word(&read(names)?, 24);
    for index in 0..count {
        let section = read(index)?;
        let name_at = u32::from_le_bytes([section[0], section[1], section[2], section[3]]);
        let mut name = [0; NAME.len()];
        // The last name may be shorter.
        let read = file.read_exact_at(&mut name, names.saturating_add(name_at.into()));
        if read.is_ok() && name == *NAME {
            let size = usize::try_from(word(&section, 32)).unwrap_or(usize::MAX);
            if size > CAPACITY {
                return Err(invalid("the section .BTF is too large"));
            }
            return Ok((word(&section, 24), size));
        }
    }
    Err(invalid("an ELF file without a section .BTF"))
}

/// Reads a word of eight bytes. All positions are inside the header.
fn word(header: &[u8; 64], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_btf_is_an_unsupported_kernel() {
        let source = Source::from(&b"not BTF"[..]);
        let error = source.parse().err().expect("not BTF");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_kernel_without_btf_names_the_setting() {
        let error = missing(io::ErrorKind::NotFound.into());
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let message = error.to_string();
        assert!(message.contains("`btf`"), "{message}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "writes files")]
    fn a_file_is_raw_btf_or_elf_with_a_section() {
        let read = |contents: &[u8]| {
            let path = std::env::temp_dir().join(format!("btf-{}", std::process::id()));
            std::fs::write(&path, contents).expect("a temporary file");
            let read = read_file(&path);
            std::fs::remove_file(path).expect("the temporary file");
            read.map_err(|error| error.to_string())
        };
        assert_eq!(read(b"raw BTF").as_deref(), Ok(&b"raw BTF"[..]));
        let elf = elf(b"\0.BTF\0");
        assert_eq!(read(&elf).as_deref(), Ok(&b"contents"[..]));
        let without = elf_without();
        assert!(read(&without).is_err_and(|error| error.contains("without a section")));
        for len in ELF_MAGIC.len()..elf.len() - 1 {
            assert!(read(&elf[..len]).is_err(), "cut at {len}");
        }
        assert!(read_file(Path::new("/nonexistent")).is_err());
    }

    fn elf_without() -> Vec<u8> {
        elf(b"\0.BTFx\0")
    }

    /// Makes an ELF file: the header, two sections, their names, and the contents at the end.
    fn elf(names: &[u8]) -> Vec<u8> {
        let contents = b"contents";
        let names_at = 3 * 64;
        let mut file = vec![0; names_at as usize];
        file[..4].copy_from_slice(ELF_MAGIC);
        file[4..6].copy_from_slice(&[2, 1]);
        let mut put = |at: usize, word: u64| file[at..at + 8].copy_from_slice(&word.to_le_bytes());
        put(40, 64);
        // Two sections, of which the first has the names. The words before them are not read.
        put(56, 2 << 32);
        put(64 + 24, names_at);
        put(128, 1);
        put(128 + 24, names_at + 16);
        put(128 + 32, contents.len() as u64);
        let mut strings = names.to_vec();
        strings.resize(16, 0);
        file.extend(strings);
        file.extend(contents);
        file
    }
}
