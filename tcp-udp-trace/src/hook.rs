//! The hooks of a tracer.

use std::fmt;

/// A signal that a tracer needs, and the kernel hooks that it uses for the signal on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Hook {
    /// The name of the signal. TCP: `state`, `end`, `accept`, `connect_failed`, `listen`,
    /// `retransmit`, `reset`, `listen_overflow`. UDP: `life`, `send`, `drop`, `receive`,
    /// `connect`. Both: `snapshot`, `sample`, and `buffer`, which names the buffer of all records
    /// ([`Buffer`](crate::Buffer)).
    pub signal: String,
    /// The hooks in use, each as `type:target`. The type `iter` is a BPF iterator, and `map` a BPF
    /// map. Empty if this kernel allows none of the known hooks.
    pub programs: Vec<String>,
    /// The cost of this choice, if a better hook exists that this machine does not allow.
    pub note: Option<String>,
}

/// Shows `signal=type:target+type:target`, and the note in parentheses.
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
