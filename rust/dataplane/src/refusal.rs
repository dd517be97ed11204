//! Why what was asked of the packet path cannot be.
//!
//! Owns:        the kinds of refusals; the text of each, and what it is about.
//! Never sees:  rings that run: what a guest breaks is a `chain::RingError`.

use std::fmt;

/// What cannot be as it was asked for; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub kind: RefusalKind,
    text: String,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Where a ring is, or how many entries it has.
    Layout,
    /// What a descriptor is of, or that there is none.
    Descriptor,
    /// Where a ring shall go on.
    Position,
    /// A number, or two that do not go together.
    Setting,
    /// More bytes than there is room for.
    Length,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// The same with what the descriptor is for in front.
    pub(crate) fn named(self, what: &str) -> Self {
        Self { text: format!("{what} {}", self.text), ..self }
    }

    /// The same of a part of what was asked for: its text begins with that.
    pub(crate) fn of(self, what: &impl fmt::Display) -> Self {
        Self { text: format!("{what}: {}", self.text), ..self }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}
