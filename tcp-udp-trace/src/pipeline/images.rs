//! Assembles the programs that owners of sockets run from the pieces that the kernel side writes.
//! No I/O.

use std::{ffi::OsString, num::NonZeroUsize, os::unix::ffi::OsStringExt as _, sync::Arc};

use lru::LruCache;
use tcp_udp_trace_common::{Identity, Image, MAX_ARGUMENTS, Owner, PIECE, kind, part};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use crate::event::{
    comm::Comm,
    process::{Parent, ProcessDetails},
};

/// How many images are kept.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// How many images may be incomplete at a time.
const INCOMPLETE: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// Identifies a program that a process ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ImageKey {
    pid: u32,
    exec: u16,
    started: u64,
}

impl ImageKey {
    pub(crate) const fn of(owner: &Owner) -> Self {
        Self {
            pid: owner.pid,
            exec: owner.exec,
            started: owner.started,
        }
    }
}

/// The pieces of an image that have arrived so far.
#[derive(Debug, Default)]
struct Pieces {
    next: u32,
    /// Last component first.
    names: Vec<Vec<u8>>,
    arguments: Vec<u8>,
}

/// The images that are known, and those whose pieces are still arriving.
#[derive(Debug)]
pub(crate) struct Images {
    known: LruCache<ImageKey, Arc<ProcessDetails>>,
    incomplete: LruCache<ImageKey, Pieces>,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            known: LruCache::new(REMEMBERED),
            incomplete: LruCache::new(INCOMPLETE),
        }
    }
}

impl Images {
    /// Returns the details of an image, if they are known.
    pub(crate) fn of(&mut self, key: ImageKey) -> Option<Arc<ProcessDetails>> {
        self.known.get(&key).cloned()
    }

    /// Takes a record if it is a piece of an image, and returns whether it was one. An image with a
    /// missing or unreadable piece is dropped.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> bool {
        let Ok(piece) = Image::read_from_bytes(bytes) else {
            return false;
        };
        if piece.head.kind != kind::IMAGE {
            return false;
        }
        let key = ImageKey {
            pid: piece.pid,
            exec: piece.exec,
            started: piece.started,
        };
        let mut pieces = match (piece.part, piece.index) {
            (part::NAME, 0) => Pieces::default(),
            _ => match self.incomplete.pop(&key) {
                Some(pieces) => pieces,
                None => return true,
            },
        };
        if pieces.next != piece.index {
            return true;
        }
        if piece.part == part::END {
            self.known.put(key, Arc::new(pieces.details(&piece)));
        } else if pieces.add(&piece).is_some() {
            self.incomplete.put(key, pieces);
        }
        true
    }
}

impl Pieces {
    /// Adds a piece; `None` if the kernel side could not read it, or bytes are missing.
    fn add(&mut self, piece: &Image) -> Option<()> {
        let bytes = piece.bytes.get(..piece.size as usize)?;
        self.next += 1;
        match piece.part {
            part::NAME => {
                // A name that fills the piece may be longer.
                let name = bytes.strip_suffix(&[0]).filter(|_| bytes.len() < PIECE)?;
                if !name.is_empty() {
                    self.names.push(name.to_vec());
                }
            }
            part::PATH_END => {
                // The indexes of the arguments start at 0 again.
                self.next = 0;
                (piece.size == 1).then_some(())?;
            }
            _ => {
                let room = MAX_ARGUMENTS.saturating_sub(self.arguments.len());
                let bytes = bytes
                    .get(..bytes.len().min(room))
                    .filter(|b| !b.is_empty())?;
                self.arguments.extend_from_slice(bytes);
            }
        }
        Some(())
    }

    /// Returns the details of an image that is complete. `last` is its last piece.
    fn details(&self, last: &Image) -> ProcessDetails {
        let mut path = Vec::new();
        for name in self.names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        let bytes = last.bytes.get(..last.size as usize).unwrap_or_default();
        let identity = Identity::read_from_bytes(bytes).unwrap_or(Identity::new_zeroed());
        ProcessDetails {
            exe: Some(OsString::from_vec(path).into()),
            cmdline: words(&self.arguments),
            parent: parent(&identity),
            ns_pid: (identity.ns_pid != 0).then_some(identity.ns_pid),
            ..ProcessDetails::default()
        }
    }
}

fn parent(identity: &Identity) -> Option<Parent> {
    (identity.parent != 0).then(|| Parent {
        pid: identity.parent,
        comm: Comm::from_bytes(identity.parent_comm.as_bytes()),
    })
}

/// Splits a command line into its arguments, each of which ends with a NUL.
pub(crate) fn words(bytes: &[u8]) -> Vec<OsString> {
    if bytes.is_empty() {
        return Vec::new();
    }
    let words = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    words
        .split(|&byte| byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect()
}
