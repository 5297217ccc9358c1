//! Telling the programs which events are wanted.
//!
//! They look at one word, and at sets whose values carry the word's generation: so a new filter is built beside the old one, and one
//! write changes over. All of it is asked of a program of ours ([`ask`]) and not written into maps from here, because a map system call
//! would keep other programs from running meanwhile.

use std::error::Error as StdError;

use aya::{Ebpf, programs::ProgramError};
use tcp_udp_trace_common::filter::{self as wire, Network, Value, op, standing};

use super::{
    control::ask,
    errors, iter,
    names::Caller,
    plan::HookPoint,
    program::{attach_program, unload},
};
use crate::{
    error::{Error, ErrorKind},
    event::{Event, Protocol, process::Process},
    filter::{Filter, Standing, compile::Compiled, resolve::Names as _},
};

/// The programs that follow the trees of processes.
const KIN: [(&str, HookPoint); 2] = [
    ("kin_fork", HookPoint::RawTracepoint("sched_process_fork")),
    ("kin_free", HookPoint::RawTracepoint("sched_process_free")),
];

/// The filter that the programs look at.
#[derive(Debug, Default)]
pub(super) struct Filters {
    generation: u16,
    installed: Installed,
    follows_kin: bool,
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
            .matches(event, |process| standing(ebpf, process))
    }

    /// [`want`](Self::want), whatever the event's ports and addresses are.
    pub(super) fn want_but_ends(&self, ebpf: &Ebpf, event: &Event) -> bool {
        self.filter
            .matches_but_ends(event, |process| standing(ebpf, process))
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
            .and_then(|()| ask(ebpf, &[op::SWITCH, word]).map_err(refused))
            .and_then(|_| ask(ebpf, &[op::PREPARE, 0]).map_err(refused));
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
        ask(ebpf, &[op::PREPARE, wire::of_generation(generation)]).map_err(refused)?;
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
        self.follow_kin(ebpf, protocol)?;
        iter::load_tasks(ebpf).map_err(no_walk)?;
        let found = find_kin(ebpf, generation, &filter.roots, new);
        iter::unload_tasks(ebpf);
        found
    }

    /// Attaches what keeps the trees up to date, unless it is.
    fn follow_kin(&mut self, ebpf: &mut Ebpf, protocol: Protocol) -> Result<(), Error> {
        if self.follows_kin {
            return Ok(());
        }
        let attached = KIN.iter().try_for_each(|(name, point)| {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
            attach_program(program, *point)
        });
        self.follows_kin = attached.is_ok();
        attached.map_err(|error| {
            for (name, _) in KIN {
                ebpf.program_mut(name).map(unload);
            }
            errors::of_signal(&error, "pid_tree", protocol).with_source(error)
        })
    }
}

/// Finds the members of the trees that are there already. Those that are made meanwhile, the programs find.
fn find_kin(
    ebpf: &mut Ebpf,
    generation: u16,
    roots: &[u32],
    new: &mut Installed,
) -> Result<(), Error> {
    for (index, &root) in roots.iter().enumerate() {
        new.add(ebpf, Value::new(generation, wire::ROOT, [root.into(), 0]))?;
        // A byte stands for a root.
        if iter::through_tasks(ebpf).map_err(no_walk)? <= index {
            let what = format!("pid_tree is {root}: there is no such process");
            return Err(Error::new(ErrorKind::InvalidFilter, what));
        }
    }
    // A child whose number is lower than its parent's was met before it.
    iter::through_tasks(ebpf).map_err(no_walk).map(drop)
}

impl Installed {
    fn add(&mut self, ebpf: &Ebpf, value: Value) -> Result<(), Error> {
        ask(ebpf, &value_args(op::ADD, &value)).map_err(refused)?;
        self.values.push(value);
        Ok(())
    }

    fn add_network(&mut self, ebpf: &Ebpf, network: Network) -> Result<(), Error> {
        ask(ebpf, &network_args(op::ADD_NETWORK, &network)).map_err(refused)?;
        self.networks.push(network);
        Ok(())
    }

    fn remove(self, ebpf: &Ebpf) {
        // What cannot be removed takes room and is not looked at.
        for value in &self.values {
            let _ = ask(ebpf, &value_args(op::REMOVE, value));
        }
        for network in &self.networks {
            let _ = ask(ebpf, &network_args(op::REMOVE_NETWORK, network));
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
fn standing(ebpf: &Ebpf, process: &Process) -> Standing {
    let started = u64::try_from(process.started.as_nanos()).unwrap_or(u64::MAX);
    let bits = ask(ebpf, &[op::STANDING, process.pid.into(), started]).unwrap_or(0);
    Standing {
        is_kin: bits & standing::KIN != 0,
        is_own: bits & standing::OWN != 0,
    }
}

fn refused(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    let what = "the kernel did not take the filter";
    Error::new(ErrorKind::Load, what).with_source(source)
}

fn no_walk(source: String) -> Error {
    let what = "pid_tree needs the kernel's iterator through all tasks, which it refuses";
    Error::new(ErrorKind::Attach, what).with_source(source)
}
