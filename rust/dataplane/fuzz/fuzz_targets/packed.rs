//! A packed ring whose guest writes what it likes, and whose ledger says what it likes.
#![no_main]

#[path = "../../tests/common/bytes.rs"]
mod bytes;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dirty.rs"]
mod dirty;
#[path = "../../tests/common/walk.rs"]
mod walk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bytes::packed(data));
