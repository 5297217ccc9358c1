//! What a tracer is attached to.

use std::fmt;

/// A signal that a tracer needs, and the kernel hooks it found for it on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Hook {
    /// What is signalled: `state`, `accept`, `end`, `retransmit`, `reset` (TCP), `life`, `send`, `receive`, `connect` (UDP), `snapshot`, `sample` (both). And
    /// `buffer`: what all of that comes through ([`Buffer`](crate::Buffer)).
    pub signal: String,
    /// The hooks in use, each as `type:target`, where `iter` is a BPF iterator and `map` a BPF map; none if this kernel allows none of those we know.
    pub programs: Vec<String>,
    /// What this choice costs, where a better one exists that this machine does not allow.
    pub note: Option<String>,
}

/// `signal=type:target+type:target`, and the note in parentheses.
impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=", self.signal)?;
        if self.programs.is_empty() {
            f.write_str("none")?;
        } else {
            f.write_str(&self.programs.join("+"))?;
        }
        match &self.note {
            Some(note) => write!(f, " ({note})"),
            None => Ok(()),
        }
    }
}
