//! The rings of real drivers, and a fixed number of mutations of them, are borne; `make fuzz` looks further, guided by
//! coverage.

#[path = "common/bytes.rs"]
mod bytes;
mod common;
#[path = "common/dirty.rs"]
mod dirty;
#[path = "common/walk.rs"]
mod walk;

use std::fs;
use std::panic::{catch_unwind, resume_unwind};
use std::path::PathBuf;

/// Some seconds without optimisation.
const MUTATIONS: usize = 10_000;

/// As `tests/fuzz/test_targets.py` has them.
const INTERESTING: [&[u8]; 9] = [
    b"\x00",
    b"\x01",
    b"\x20",
    b"\x7f",
    b"\xff",
    b"\x80\x00",
    b"\x00\x80",
    b"\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
];

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/seeds").join(target);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Draws by xorshift: always the same.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// A seed with up to four changes, as a fuzzer makes them.
fn mutated(chance: &mut Chance, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[chance.below(seeds.len())].clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(data.len() + 1);
        let end = (at + 1 + chance.below(16)).min(data.len()).max(at);
        match chance.below(6) {
            0 if at < data.len() => data[at] ^= 1 << chance.below(8),
            1 => drop(data.splice(at..end, INTERESTING[chance.below(INTERESTING.len())].iter().copied())),
            2 => drop(data.splice(at..at, INTERESTING[chance.below(INTERESTING.len())].iter().copied())),
            3 => drop(data.drain(at..end)),
            4 => {
                let other = &seeds[chance.below(seeds.len())];
                let from = chance.below(other.len());
                let piece = other[from..(from + 16).min(other.len())].to_vec();
                drop(data.splice(at..end, piece));
            }
            _ => {
                let piece = data[at..end].to_vec();
                drop(data.splice(at..at, piece));
            }
        }
    }
    data
}

fn check(target: fn(&[u8]), data: &[u8]) {
    if let Err(panic) = catch_unwind(|| target(data)) {
        eprintln!("the input was {data:02x?}");
        resume_unwind(panic);
    }
}

fn check_all(name: &str, target: fn(&[u8])) {
    let seeds = seeds(name);
    for seed in &seeds {
        for length in 0..=seed.len() {
            check(target, &seed[..length]);
        }
    }
    let mut chance = Chance(0x5eed);
    for _ in 0..MUTATIONS {
        check(target, &mutated(&mut chance, &seeds));
    }
}

#[test]
fn mutations_of_split_rings_are_borne() {
    check_all("split", bytes::split);
}

#[test]
fn mutations_of_packed_rings_are_borne() {
    check_all("packed", bytes::packed);
}
