//! The program that the owner of a socket runs. It is written once, in the owner's own context,
//! before the first record that names the owner. A process may end before user space can read
//! `/proc`.

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::generated::{bpf_probe_read_kernel_str, bpf_probe_read_user},
    macros::map,
    maps::LruHashMap,
};
use tcp_udp_trace_common::{Field, Identity, Image, MAX_ARGUMENTS, Owner, PIECE, kind, part};

use crate::{
    emit::{self, Context, Priority},
    read::{current_task, has, offset, read, read_into},
    task::{self, leader},
};

/// Not 0 if user space has enabled images.
#[unsafe(no_mangle)]
static IMAGES: Global<u8> = Global::new(0);

/// The images that have been written. The key is the start time, then pid and exec.
#[map]
static SEEN: LruHashMap<[u64; 2], u8> = LruHashMap::with_max_entries(4096, 0);

/// The maximum number of components and mount points of a path.
const MAX_STEPS: u32 = 40;

/// The maximum number of pieces of a command line.
const MAX_PIECES: u32 = MAX_ARGUMENTS.div_ceil(PIECE) as u32;

/// Returns [`Owner::exec`] from the kernel's number, or 0 if images are disabled.
#[inline(always)]
pub(crate) fn exec(number: impl FnOnce() -> u64) -> u16 {
    if IMAGES.load() == 0 {
        return 0;
    }
    number() as u16
}

/// Writes the image of the current process, if images are enabled and this image is new.
#[inline(always)]
pub(crate) fn write_if_new(ctx: Context, owner: &Owner) {
    if IMAGES.load() != 0 {
        write(
            ctx,
            owner.started,
            u64::from(owner.pid) | u64::from(owner.exec) << 32,
        );
    }
}

/// Writes the pieces of one image.
#[derive(Clone, Copy)]
struct Writer {
    ctx: Context,
    started: u64,
    name: u64,
}

impl Writer {
    /// Writes a piece. `fill` writes the piece's bytes and returns their number.
    #[inline(always)]
    fn piece(self, part: u16, index: u32, fill: impl Fn(&mut [u8; PIECE]) -> u32) {
        emit::record(
            self.ctx,
            kind::IMAGE,
            Priority::Normal,
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

// Not inlined: the function has a stack frame of its own, and programs that call it twice contain
// it once.
#[inline(never)]
fn write(ctx: Context, started: u64, name: u64) -> u32 {
    let key = [started, name];
    // SAFETY: the value is not read.
    if unsafe { SEEN.get(key) }.is_some()
        || SEEN.insert(key, 0, u64::from(BPF_NOEXIST)).is_err()
        || !has(Field::ExecId)
    {
        return 0;
    }
    let writer = Writer { ctx, started, name };
    let mm = read::<u64>(current_task(), Field::Mm);
    path(writer, mm);
    arguments(writer, mm);
    0
}

/// Writes the parent of the current process, and its number in its own pid namespace. Returns the
/// number of bytes.
#[inline(always)]
fn identity(bytes: &mut [u8; PIECE]) -> u32 {
    let process = leader(current_task());
    let parent = leader(read(process, Field::RealParent));
    let level = read(task::pid(process), Field::PidLevel);
    let to = bytes.as_mut_ptr().cast::<Identity>();
    // SAFETY: a record is aligned to 8 bytes, and so are the bytes in it. They have room.
    let to = unsafe { &mut *to };
    read_into(&mut to.parent_comm, parent, Field::Comm);
    read_into(&mut to.parent, parent, Field::Tgid);
    to.ns_pid = task::number(process, level);
    size_of::<Identity>() as u32
}

/// Writes the path of the executable, up to the root of its mount namespace.
///
/// Each step writes one piece with the step's number, and no byte of the path stays in a register
/// or on the stack after the step. Old kernels' verifiers compare all numbers of a program that has
/// functions, so they see each step once.
#[inline(always)]
fn path(writer: Writer, mm: u64) {
    let file = read::<u64>(mm, Field::ExeFile);
    let mut dentry = read::<u64>(file, Field::FileDentry);
    let vfsmount = read::<u64>(file, Field::FileMount);
    let in_mount = offset(Field::MountRoot).wrapping_sub(offset(Field::VfsMountRoot));
    let mut mount = vfsmount.wrapping_sub(u64::from(in_mount));
    let mut step = 0;
    // The kernel marks the path of a deleted file. User space finds that mark in `/proc`.
    let mut is_whole = false;
    if mm != 0 && read::<u64>(dentry, Field::DentryHashed) != 0 {
        while step < MAX_STEPS {
            let mut name = 0;
            if dentry == read::<u64>(mount, Field::MountRoot) {
                let parent = read::<u64>(mount, Field::MountParent);
                if parent == mount || parent == 0 {
                    is_whole = parent != 0;
                    break;
                }
                dentry = read(mount, Field::MountPoint);
                mount = parent;
            } else {
                let parent = read::<u64>(dentry, Field::DentryParent);
                if parent == dentry || parent == 0 {
                    break;
                }
                name = read::<u64>(dentry, Field::DentryName);
                dentry = parent;
            }
            writer.piece(part::NAME, step, |bytes| {
                // SAFETY: the helper writes at most the bytes of a piece, even if the pointer is
                // bad.
                let size = unsafe {
                    bpf_probe_read_kernel_str(
                        bytes.as_mut_ptr().cast(),
                        PIECE as u32,
                        name as *const _,
                    )
                };
                if name == 0 {
                    // A mount point adds no name.
                    bytes[0] = 0;
                    1
                } else if size > 0 {
                    size as u32
                } else {
                    0
                }
            });
            step += 1;
        }
    }
    writer.piece(part::PATH_END, step, |_| u32::from(is_whole));
}

/// Writes the beginning of the command line, and the end of the image.
#[inline(always)]
fn arguments(writer: Writer, mm: u64) {
    let mut piece = 0;
    let mut address = read::<u64>(mm, Field::ArgStart);
    let end = read::<u64>(mm, Field::ArgEnd);
    while piece < MAX_PIECES && address < end {
        let left = end - address;
        writer.piece(part::ARGUMENTS, piece, |bytes| {
            // The verifier of Linux 5.10 loses the bounds of a plain minimum. `black_box` hides the
            // bounds from the compiler, so the compiler keeps both steps, which the verifier
            // follows.
            let left = if left < PIECE as u64 {
                left
            } else {
                PIECE as u64
            };
            let size = core::hint::black_box(left) as u32 & 0xff;
            if size > PIECE as u32 {
                return 0;
            }
            // SAFETY: the helper writes at most the bytes of a piece.
            let error = unsafe {
                bpf_probe_read_user(bytes.as_mut_ptr().cast(), size, address as *const _)
            };
            if error == 0 { size } else { 0 }
        });
        piece += 1;
        address += PIECE as u64;
    }
    writer.piece(part::END, piece, identity);
}
