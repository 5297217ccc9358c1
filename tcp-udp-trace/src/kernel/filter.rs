//! Sets the filter of the programs.
//!
//! The programs read one word, and sets whose values have the word's generation. So a new filter is
//! built beside the old one, and one write switches over. A control program ([`control_filter`])
//! makes all these changes. A map system call would keep other programs from running in the
//! meantime.

use std::error::Error as StdError;

use aya::{
    Ebpf,
    maps::lpm_trie::{Key, LpmTrie},
    programs::ProgramError,
};
use tcp_udp_trace_common::filter::{self as wire, Network, Value, membership, op, verdict};

use super::{
    btf::ids::Ids,
    control::control_filter,
    errors, iter,
    names::Caller,
    plan::HookPoint,
    program::{attach_program, unload},
};
use crate::{
    error::{Error, ErrorKind},
    event::{Event, Protocol, process::Process},
    filter::{Filter, Members, Membership, compile::Compiled, resolve::Names as _},
};

/// The programs that keep the process trees up to date.
const TREE_PROGRAMS: [(&str, HookPoint); 2] = [
    ("tree_fork", HookPoint::RawTracepoint("sched_process_fork")),
    ("tree_free", HookPoint::RawTracepoint("sched_process_free")),
];

/// The filter that the programs use.
#[derive(Debug, Default)]
pub(super) struct Filters {
    generation: u16,
    /// The generation of the current filter.
    current: u16,
    installed: Installed,
    follows_trees: bool,
    /// The filter, with its names resolved.
    filter: Filter,
    /// The ids of the types that a filter may need.
    ids: Ids,
    networks: NetworkWriter,
}

/// The way of networks into their map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum NetworkWriter {
    #[default]
    Program,
    /// On this real-time kernel, writers of the map sleep, which programs must not do. During a map
    /// system call, the kernel skips kprobe and classic tracepoint programs on that CPU.
    SystemCall,
}

/// The parts of a filter that are in the maps.
#[derive(Debug, Default)]
struct Installed {
    values: Vec<Value>,
    networks: Vec<Network>,
}

impl Filters {
    pub(super) fn new(ids: Ids, networks: NetworkWriter) -> Self {
        Self {
            ids,
            networks,
            ..Self::default()
        }
    }

    /// Returns whether there ever was a filter.
    pub(super) fn were_used(&self) -> bool {
        self.generation != 0
    }

    /// Returns whether an event that user space produced passes.
    pub(super) fn passes(&self, ebpf: &Ebpf, event: &Event) -> bool {
        self.filter.matches(event, &Programs(ebpf))
    }

    /// Like [`passes`](Self::passes), without a check of the event's ports and addresses.
    pub(super) fn passes_but_ends(&self, ebpf: &Ebpf, event: &Event) -> bool {
        self.filter.matches_but_ends(event, &Programs(ebpf))
    }

    /// Installs a filter. After an error, the old one stays.
    pub(super) fn install(
        &mut self,
        ebpf: &mut Ebpf,
        filter: &Filter,
        protocol: Protocol,
    ) -> Result<(), Error> {
        // An error of the caller's filter must show the caller's values, so it is checked before it
        // is resolved.
        filter.compile()?;
        let resolved = filter.resolve(&mut Caller::new(ebpf, &self.ids))?;
        self.switch(ebpf, &resolved.compile()?, protocol)?;
        self.filter = resolved;
        Ok(())
    }

    fn switch(
        &mut self,
        ebpf: &mut Ebpf,
        filter: &Compiled,
        protocol: Protocol,
    ) -> Result<(), Error> {
        if filter.word == 0 && !self.were_used() {
            return Ok(());
        }
        // If the current generation is odd, the new one is even, or vice versa. 0 means no
        // generation.
        let next = |generation: u16| generation.checked_add(1).unwrap_or(2);
        self.generation = next(self.generation);
        if self.generation % 2 == self.current % 2 {
            // The filter of the generation in between was refused.
            self.generation = next(self.generation);
        }
        let mut new = Installed::default();
        let built = self.build(ebpf, filter, protocol, &mut new);
        let word = match filter.word {
            0 => 0,
            word => word | wire::of_generation(self.generation),
        };
        let switched = built
            .and_then(|()| control_filter(ebpf, &[op::SWITCH, word]).map_err(refused))
            .and_then(|_| control_filter(ebpf, &[op::PREPARE, 0]).map_err(refused));
        if let Err(error) = switched {
            new.remove(ebpf, self.networks);
            return Err(error);
        }
        self.current = self.generation;
        // A program that has started with the old filter notices the change, and uses the new one.
        std::mem::replace(&mut self.installed, new).remove(ebpf, self.networks);
        Ok(())
    }

    fn build(
        &mut self,
        ebpf: &mut Ebpf,
        filter: &Compiled,
        protocol: Protocol,
        new: &mut Installed,
    ) -> Result<(), Error> {
        let generation = self.generation;
        let prepared = wire::of_generation(generation);
        control_filter(ebpf, &[op::PREPARE, prepared, filter.argument]).map_err(refused)?;
        for &(set, value) in &filter.values {
            new.add(ebpf, Value::new(generation, set, value))?;
        }
        for network in &filter.networks {
            let verdict = if network.is_excluded {
                verdict::EXCLUDED
            } else {
                verdict::PASSES
            };
            let network = network.wire(generation);
            self.networks
                .set(ebpf, &network, Some(verdict))
                .map_err(refused)?;
            new.networks.push(network);
        }
        if filter.exclude_self {
            let pid = Caller::new(ebpf, &self.ids).own_pid()?;
            new.add(ebpf, Value::new(generation, wire::OWN, [pid.into(), 0]))?;
        }
        if filter.roots.is_empty() {
            return Ok(());
        }
        self.follow_trees(ebpf, protocol)?;
        iter::load_tasks(ebpf, &self.ids).map_err(no_iterator)?;
        let found = find_tree_members(ebpf, generation, &filter.roots, new);
        iter::unload_tasks(ebpf);
        found
    }

    /// Attaches the programs that keep the trees up to date, unless they are attached.
    fn follow_trees(&mut self, ebpf: &mut Ebpf, protocol: Protocol) -> Result<(), Error> {
        if self.follows_trees {
            return Ok(());
        }
        let attached = TREE_PROGRAMS.iter().try_for_each(|(name, point)| {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
            attach_program(program, *point, &self.ids)
        });
        self.follows_trees = attached.is_ok();
        attached.map_err(|error| {
            for (name, _) in TREE_PROGRAMS {
                ebpf.program_mut(name).map(unload);
            }
            errors::of_signal(&error, "pid_tree", protocol).with_source(error)
        })
    }
}

/// Finds the existing members of the trees. The programs find those that start in the meantime.
fn find_tree_members(
    ebpf: &mut Ebpf,
    generation: u16,
    roots: &[u32],
    new: &mut Installed,
) -> Result<(), Error> {
    for (index, &root) in roots.iter().enumerate() {
        new.add(ebpf, Value::new(generation, wire::ROOT, [root.into(), 0]))?;
        // Each byte represents a root.
        if iter::visit_tasks(ebpf).map_err(no_iterator)? <= index {
            let message = format!("pid_tree is {root}: there is no such process");
            return Err(Error::new(ErrorKind::InvalidFilter, message));
        }
    }
    // The first pass visits a child before its parent if the child's number is lower.
    iter::visit_tasks(ebpf).map_err(no_iterator).map(drop)
}

impl Installed {
    fn add(&mut self, ebpf: &Ebpf, value: Value) -> Result<(), Error> {
        control_filter(ebpf, &value_args(op::ADD, &value)).map_err(refused)?;
        self.values.push(value);
        Ok(())
    }

    fn remove(self, ebpf: &mut Ebpf, writer: NetworkWriter) {
        // A value that cannot be removed takes room, but no program uses it.
        for value in &self.values {
            let _ = control_filter(ebpf, &value_args(op::REMOVE, value));
        }
        for network in &self.networks {
            let _ = writer.set(ebpf, network, None);
        }
    }
}

impl NetworkWriter {
    /// Inserts a network with its verdict, or removes it.
    fn set(
        self,
        ebpf: &mut Ebpf,
        network: &Network,
        verdict: Option<u8>,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        if self == Self::Program {
            let op = match verdict {
                Some(verdict::PASSES) => op::ADD_NETWORK,
                Some(_) => op::EXCLUDE_NETWORK,
                None => op::REMOVE_NETWORK,
            };
            control_filter(ebpf, &network_args(op, network))?;
            return Ok(());
        }
        let map = ebpf
            .map_mut("NETWORKS")
            .ok_or("the object has no such map")?;
        let mut networks = LpmTrie::<_, [u32; 5], u8>::try_from(map)?;
        let &Network { head, address } = network;
        // The words of 32 bits, in the order in which they are in memory.
        let words = [head, address[0], address[1]].map(|word| [word as u32, (word >> 32) as u32]);
        let [[bits, tag], [first, second], [third, fourth]] = words;
        let key = Key::new(bits, [tag, first, second, third, fourth]);
        match verdict {
            Some(verdict) => networks.insert(&key, verdict, 0)?,
            None => networks.remove(&key)?,
        }
        Ok(())
    }
}

fn value_args(op: u64, value: &Value) -> [u64; 4] {
    let &Value {
        value: [first, second],
        tag,
    } = value;
    [op, first, second, tag]
}

fn network_args(op: u64, network: &Network) -> [u64; 4] {
    let &Network {
        head,
        address: [first, second],
    } = network;
    [op, head, first, second]
}

/// The programs' knowledge of the current filter. If a query fails, there are no members.
struct Programs<'a>(&'a Ebpf);

impl Members for Programs<'_> {
    fn has_process(&self, process: &Process) -> Membership {
        let started = u64::try_from(process.started.as_nanos()).unwrap_or(u64::MAX);
        let args = [op::MEMBERSHIP, process.pid.into(), started];
        let bits = control_filter(self.0, &args).unwrap_or(0);
        Membership {
            is_in_tree: bits & membership::TREE != 0,
            is_own: bits & membership::OWN != 0,
        }
    }

    fn has_cgroup(&self, id: u64) -> bool {
        control_filter(self.0, &[op::IS_BELOW, id]).is_ok_and(|answer| answer != 0)
    }
}

fn refused(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    let message = "the kernel refused the filter";
    Error::new(ErrorKind::Load, message).with_source(source)
}

fn no_iterator(source: String) -> Error {
    let message = "pid_tree needs the iterator over all tasks, which the kernel refuses";
    Error::new(ErrorKind::Attach, message).with_source(source)
}
