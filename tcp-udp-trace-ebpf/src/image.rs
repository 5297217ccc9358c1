//! Which program the owner of a socket runs: written once, in the owner's own context, before the
//! first record that names it. A process may end before user space can look at `/proc`.

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::generated::{bpf_probe_read_kernel_str, bpf_probe_read_user},
    macros::map,
    maps::LruHashMap,
};
use tcp_udp_trace_common::{Field, Image, MAX_ARGUMENTS, Owner, PIECE, kind, part};

use crate::{
    emit::{self, Context, Weight},
    owner::current_task,
    sock::{has, offset, read},
};

/// Whether user space wants images.
#[unsafe(no_mangle)]
static IMAGES: Global<u8> = Global::new(0);

/// The images that have been written: start, then pid and exec.
#[map]
static SEEN: LruHashMap<[u64; 2], u8> = LruHashMap::with_max_entries(4096, 0);

/// The most components and mount points of a path.
const MAX_STEPS: u32 = 40;

/// The most pieces of a command line.
const MAX_PIECES: usize = MAX_ARGUMENTS.div_ceil(PIECE);

/// See [`Owner::exec`]. Without images it is not read.
#[inline(always)]
pub(crate) fn exec(leader: u64) -> u16 {
    if IMAGES.load() == 0 {
        return 0;
    }
    read::<u64>(leader, Field::ExecId) as u16
}

/// Writes the image of the current process, if images are wanted and this one is new.
#[inline(always)]
pub(crate) fn note(ctx: Context, owner: &Owner) {
    if IMAGES.load() != 0 {
        write(
            ctx,
            owner.started,
            u64::from(owner.pid) | u64::from(owner.exec) << 32,
        );
    }
}

/// Writes pieces of one image.
#[derive(Clone, Copy)]
struct Writer {
    ctx: Context,
    started: u64,
    name: u64,
}

impl Writer {
    /// Writes a piece; `fill` writes its bytes and returns their number.
    #[inline(always)]
    fn piece(self, part: u16, index: u32, fill: impl Fn(&mut [u8; PIECE]) -> u32) {
        emit::record(
            self.ctx,
            kind::IMAGE,
            Weight::Other,
            |record: &mut Image| {
                record.started = self.started;
                record.pid = self.name as u32;
                record.exec = (self.name >> 32) as u16;
                record.part = part;
                record.index = index;
                record.size = fill(&mut record.bytes);
            },
        );
    }
}

// Not inlined: it has a stack of its own, and the programs that call it twice have it once.
#[inline(never)]
fn write(ctx: Context, started: u64, name: u64) -> u32 {
    let key = [started, name];
    // SAFETY: the value is not looked at.
    if unsafe { SEEN.get(key) }.is_some()
        || SEEN.insert(key, 0, u64::from(BPF_NOEXIST)).is_err()
        || !has(Field::ExecId)
    {
        return 0;
    }
    let writer = Writer { ctx, started, name };
    let mm = read::<u64>(current_task(), Field::Mm);
    let (names, is_whole) = path(writer, mm);
    let pieces = arguments(writer, mm, names);
    writer.piece(part::END, pieces, |_| u32::from(is_whole));
    0
}

/// Writes the path of the executable, up to the root of its mount namespace. Returns the number of
/// pieces, and whether that is the path.
#[inline(always)]
fn path(writer: Writer, mm: u64) -> (u32, bool) {
    let file = read::<u64>(mm, Field::ExeFile);
    let mut dentry = read::<u64>(file, Field::FileDentry);
    let vfsmount = read::<u64>(file, Field::FileMount);
    let in_mount = offset(Field::MountRoot).wrapping_sub(offset(Field::VfsMountRoot));
    let mut mount = vfsmount.wrapping_sub(u64::from(in_mount));
    let mut pieces = 0;
    // The kernel marks the path of a deleted file, and user space finds the mark in `/proc`.
    if mm == 0 || read::<u64>(dentry, Field::DentryHashed) == 0 {
        return (0, false);
    }
    for _ in 0..MAX_STEPS {
        if dentry == read::<u64>(mount, Field::MountRoot) {
            let parent = read::<u64>(mount, Field::MountParent);
            if parent == mount || parent == 0 {
                return (pieces, parent != 0);
            }
            dentry = read(mount, Field::MountPoint);
            mount = parent;
            continue;
        }
        let parent = read::<u64>(dentry, Field::DentryParent);
        if parent == dentry || parent == 0 {
            break;
        }
        let name = read::<u64>(dentry, Field::DentryName);
        writer.piece(part::NAME, pieces, |bytes| {
            // SAFETY: the helper writes at most the bytes of a piece.
            let size = unsafe {
                bpf_probe_read_kernel_str(bytes.as_mut_ptr().cast(), PIECE as u32, name as *const _)
            };
            if size > 0 { size as u32 } else { 0 }
        });
        pieces += 1;
        dentry = parent;
    }
    (pieces, false)
}

/// Writes the beginning of the command line. Returns the number of pieces with those before.
#[inline(always)]
fn arguments(writer: Writer, mm: u64, mut pieces: u32) -> u32 {
    let mut address = read::<u64>(mm, Field::ArgStart);
    let end = read::<u64>(mm, Field::ArgEnd);
    for _ in 0..MAX_PIECES {
        if address >= end {
            break;
        }
        let left = end - address;
        writer.piece(part::ARGUMENTS, pieces, |bytes| {
            let size = if left < PIECE as u64 {
                left as u32
            } else {
                PIECE as u32
            };
            // SAFETY: the helper writes at most the bytes of a piece.
            let error = unsafe {
                bpf_probe_read_user(bytes.as_mut_ptr().cast(), size, address as *const _)
            };
            if error == 0 { size } else { 0 }
        });
        pieces += 1;
        address += PIECE as u64;
    }
    pieces
}
