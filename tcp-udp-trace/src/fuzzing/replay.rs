//! Replays the seeds, intact and damaged.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

use super::{btf, event_json, filter, names, netlink, record, seeds::seeds};
use crate::event::escape::Escaped;

#[test]
fn record_survives() {
    replay("record", record);
}

#[test]
fn btf_survives() {
    replay("btf", btf);
}

#[test]
fn netlink_survives() {
    replay("netlink", netlink);
}

#[test]
fn event_json_survives() {
    replay("event_json", event_json);
}

#[test]
fn filter_survives() {
    replay("filter", filter);
}

#[test]
fn names_survive() {
    replay("names", names);
}

/// Checks the seeds of a target: intact, with one damage at each position, and at random with
/// several damages. Also checks random bytes.
fn replay(target: &str, check: fn(&[u8])) {
    let seeds = seeds(target);
    for seed in &seeds {
        checked(seed, check);
        // Miri is too slow for damaged seeds.
        if cfg!(miri) {
            continue;
        }
        // Not every position of a large seed.
        for place in (0..seed.len()).step_by(1 + seed.len() / PLACES) {
            damaged_at(place, seed, |damaged| checked(damaged, check));
        }
    }

    let mut random = Random::default();
    for case in 0..if cfg!(miri) { 0 } else { 2_000 } {
        let bytes = if case % 10 == 0 {
            let length = random.below(600);
            random.bytes(length)
        } else {
            let seed = &seeds[random.below(seeds.len())];
            random.damage(seed)
        };
        checked(&bytes, check);
    }
}

/// Random numbers, the same in each run, so that a failure can be repeated.
#[derive(Default)]
struct Random {
    drawn: u64,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.drawn += 1;
        BuildHasherDefault::<DefaultHasher>::default().hash_one(self.drawn)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// Damages a seed at 1 to 5 positions: overwrites or inserts bytes, or cuts off the rest.
    fn damage(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(5) {
            let place = self.below(bytes.len() + 1);
            let length = 1 + self.below(4);
            let new = self.bytes(length);
            let old = match self.below(10) {
                0 => 0,
                1 => bytes.len() - place,
                _ => new.len().min(bytes.len() - place),
            };
            bytes.splice(place..place + old, new);
        }
        bytes
    }
}

/// How many positions of a seed are damaged one by one.
const PLACES: usize = 512;

/// Cuts the bytes off at a position, or changes the bytes there.
fn damaged_at(place: usize, bytes: &[u8], take: impl Fn(&[u8])) {
    take(&bytes[..place]);
    let old = bytes[place];
    let flipped = (0..8).map(|bit| old ^ 1 << bit);
    for byte in flipped.chain([0, 1, 0x7f, 0x80, 0xff]) {
        let mut bytes = bytes.to_vec();
        bytes[place] = byte;
        take(&bytes);
    }
    for word in [
        0,
        1,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX - 11,
        u32::MAX,
    ] {
        let mut bytes = bytes.to_vec();
        if let Some(word_there) = bytes.get_mut(place..place + 4) {
            word_there.copy_from_slice(&u32::to_ne_bytes(word));
            take(&bytes);
        }
    }
}

/// Checks bytes, and shows them if that fails.
fn checked(bytes: &[u8], check: fn(&[u8])) {
    struct Input<'a>(&'a [u8]);
    impl Drop for Input<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("with the input {}", Escaped(self.0));
            }
        }
    }
    let _input = Input(bytes);
    check(bytes);
}
