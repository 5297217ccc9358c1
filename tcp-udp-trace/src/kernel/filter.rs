//! Telling the programs which events are wanted.
//!
//! They look at one word, and at sets whose values carry the word's generation: so a new filter is built beside the old one, and one
//! write changes over. All of it is asked of a program of ours ([`control_filter`]) and not written into maps from here, because a map system call
//! would keep other programs from running meanwhile.

use std::error::Error as StdError;

use aya::{Ebpf, programs::ProgramError};
use tcp_udp_trace_common::filter::{self as wire, Network, Value, op, standing as membership};

use super::{
    control::control_filter,
    errors, iter,
    names::Caller,
    plan::HookPoint,
    program::{attach_program, unload},
};
use crate::{
    error::{Error, ErrorKind},
    event::{Event, Protocol, process::Process},
    filter::{Filter, Membership, compile::Compiled, resolve::Names as _},
};

/// The programs that follow the trees of processes.
const TREE_PROGRAMS: [(&str, HookPoint); 2] = [
    ("tree_fork", HookPoint::RawTracepoint("sched_process_fork")),
    ("tree_free", HookPoint::RawTracepoint("sched_process_free")),
];

/// The filter that the programs look at.
#[derive(Debug, Default)]
pub(super) struct Filters {
    generation: u16,
    installed: Installed,
    follows_trees: bool,
    /// With the names resolved.
    filter: Filter,
}

/// What there is of a filter in the maps.
#[derive(Debug, Default)]
struct Installed {
    values: Vec<Value>,
    networks: Vec<Network>,
}

impl Filters {
    /// Whether there ever was one.
    pub(super) fn were_used(&self) -> bool {
        self.generation != 0
    }

    /// Whether an event that user space made is wanted.
    pub(super) fn want(&self, ebpf: &Ebpf, event: &Event) -> bool {
        self.filter
            .matches(event, |process| membership(ebpf, process))
    }

    /// [`want`](Self::want), whatever the event's ports and addresses are.
    pub(super) fn want_but_ends(&self, ebpf: &Ebpf, event: &Event) -> bool {
        self.filter
            .matches_but_ends(event, |process| membership(ebpf, process))
    }

    /// Lets this be the filter from now on. If that fails, the one of before stays.
    pub(super) fn install(
        &mut self,
        ebpf: &mut Ebpf,
        filter: &Filter,
        protocol: Protocol,
    ) -> Result<(), Error> {
        // What makes no sense is refused as the caller wrote it.
        filter.compile()?;
        let resolved = filter.resolve(&mut Caller::new(ebpf))?;
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
        // Of two that follow each other, one is odd; 0 is none.
        self.generation = self.generation.checked_add(1).unwrap_or(2);
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
            new.remove(ebpf);
            return Err(error);
        }
        // A program that has begun with it will notice, and ask the new one.
        std::mem::replace(&mut self.installed, new).remove(ebpf);
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
        control_filter(ebpf, &[op::PREPARE, wire::of_generation(generation)]).map_err(refused)?;
        for &(set, value) in &filter.values {
            new.add(ebpf, Value::new(generation, set, value))?;
        }
        for network in &filter.networks {
            new.add_network(ebpf, network.wire(generation))?;
        }
        if filter.exclude_self {
            let pid = Caller::new(ebpf).own_pid()?;
            new.add(ebpf, Value::new(generation, wire::OWN, [pid.into(), 0]))?;
        }
        if filter.roots.is_empty() {
            return Ok(());
        }
        self.follow_trees(ebpf, protocol)?;
        iter::load_tasks(ebpf).map_err(no_iterator)?;
        let found = find_tree_members(ebpf, generation, &filter.roots, new);
        iter::unload_tasks(ebpf);
        found
    }

    /// Attaches what keeps the trees up to date, unless it is.
    fn follow_trees(&mut self, ebpf: &mut Ebpf, protocol: Protocol) -> Result<(), Error> {
        if self.follows_trees {
            return Ok(());
        }
        let attached = TREE_PROGRAMS.iter().try_for_each(|(name, point)| {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
            attach_program(program, *point)
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

/// Finds the members of the trees that are there already. Those that are made meanwhile, the programs find.
fn find_tree_members(
    ebpf: &mut Ebpf,
    generation: u16,
    roots: &[u32],
    new: &mut Installed,
) -> Result<(), Error> {
    for (index, &root) in roots.iter().enumerate() {
        new.add(ebpf, Value::new(generation, wire::ROOT, [root.into(), 0]))?;
        // A byte stands for a root.
        if iter::visit_tasks(ebpf).map_err(no_iterator)? <= index {
            let what = format!("pid_tree is {root}: there is no such process");
            return Err(Error::new(ErrorKind::InvalidFilter, what));
        }
    }
    // A child whose number is lower than its parent's was met before it.
    iter::visit_tasks(ebpf).map_err(no_iterator).map(drop)
}

impl Installed {
    fn add(&mut self, ebpf: &Ebpf, value: Value) -> Result<(), Error> {
        control_filter(ebpf, &value_args(op::ADD, &value)).map_err(refused)?;
        self.values.push(value);
        Ok(())
    }

    fn add_network(&mut self, ebpf: &Ebpf, network: Network) -> Result<(), Error> {
        control_filter(ebpf, &network_args(op::ADD_NETWORK, &network)).map_err(refused)?;
        self.networks.push(network);
        Ok(())
    }

    fn remove(self, ebpf: &Ebpf) {
        // What cannot be removed takes room and is not looked at.
        for value in &self.values {
            let _ = control_filter(ebpf, &value_args(op::REMOVE, value));
        }
        for network in &self.networks {
            let _ = control_filter(ebpf, &network_args(op::REMOVE_NETWORK, network));
        }
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

/// What a process is to the filter; nothing, if that cannot be asked.
fn membership(ebpf: &Ebpf, process: &Process) -> Membership {
    let started = u64::try_from(process.started.as_nanos()).unwrap_or(u64::MAX);
    let bits = control_filter(ebpf, &[op::STANDING, process.pid.into(), started]).unwrap_or(0);
    Membership {
        is_in_tree: bits & membership::KIN != 0,
        is_own: bits & membership::OWN != 0,
    }
}

fn refused(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    let what = "the kernel did not take the filter";
    Error::new(ErrorKind::Load, what).with_source(source)
}

fn no_iterator(source: String) -> Error {
    let what = "pid_tree needs the kernel's iterator through all tasks, which it refuses";
    Error::new(ErrorKind::Attach, what).with_source(source)
}
