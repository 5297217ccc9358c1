//! BPF iterators: the kernel visits existing objects, and runs a program for each.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    thread,
};

use aya::{
    Ebpf,
    programs::{Iter, Program, ProgramError},
};

use tcp_udp_trace_common::filter::from_numbers;

use super::{
    btf::ids::{self, Ids, Target},
    errors::chain,
    privileges::{Privileges, SYS_PTRACE},
    program::unload,
};
use crate::{config::Config, event::Protocol, hook::Hook, netns};

/// A program, and the kernel's iterator (`bpf_iter_…`) that runs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct IterProgram {
    pub(super) program: &'static str,
    iterator: &'static str,
}

impl IterProgram {
    pub(super) fn target(self) -> Target {
        Target::iterator(self.iterator)
    }

    pub(super) fn load(self, program: &mut Program, ids: &aya::Btf) -> Result<(), ProgramError> {
        <&mut Iter>::try_from(program)?.load(self.iterator, ids)
    }
}

/// Visits every open file of every process: finds the sockets that are older than the tracer, and
/// their owners.
const fn files(protocol: Protocol) -> IterProgram {
    IterProgram {
        program: match protocol {
            Protocol::Tcp => "iter_files_tcp",
            Protocol::Udp => "iter_files_udp",
        },
        iterator: "task_file",
    }
}

/// Visits the sockets of a network namespace.
const SOCKETS: [IterProgram; 2] = [
    IterProgram {
        program: "iter_tcp",
        iterator: "tcp",
    },
    IterProgram {
        program: "iter_udp",
        iterator: "udp",
    },
];

/// Visits every task: finds the members of a filter's trees.
const TASKS: IterProgram = IterProgram {
    program: "iter_tasks",
    iterator: "task",
};

/// Visits every task: returns the pids of the caller's pid namespace.
const PIDS: IterProgram = IterProgram {
    program: "iter_pids",
    iterator: "task",
};

const NO_SNAPSHOT: &str = "sockets older than the tracer have no owner until they are used";
const NO_SAMPLES: &str = "no samples";
const OWN_NAMESPACE: &str =
    "without CAP_SYS_ADMIN, only this process's network namespace is sampled";
const SIMILAR_PROCESSES: &str = "without CAP_SYS_PTRACE, namespaces whose \
     processes all belong to other users or have more capabilities are not sampled";

/// The sockets that can be sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SampleScope {
    /// None: samples are disabled, or the kernel does not allow them.
    Nothing,
    /// Those of the process's own network namespace.
    OwnNamespace,
    /// Those of every network namespace.
    EveryNamespace,
}

/// The result of starting the iterators.
pub(super) struct Started {
    pub(super) hooks: Vec<Hook>,
    pub(super) samples: SampleScope,
}

/// Takes the snapshot of existing sockets, and prepares the samples if they are enabled. The notes
/// of the hooks report anything that the kernel refuses.
pub(super) fn start(ebpf: &mut Ebpf, config: &Config, ids: &Ids) -> Started {
    let Config {
        protocol,
        sample_interval,
        ..
    } = *config;
    let (files, sockets) = (files(protocol), sockets(protocol));
    let mut hooks = Vec::new();
    let snapshot = load(ebpf, files, ids)
        .and_then(|()| open_iter(ebpf, files))
        .and_then(read_to_end)
        .map(drop);
    if let Some(program) = ebpf.program_mut(files.program) {
        unload(program);
    }
    hooks.push(hook("snapshot", files, snapshot, NO_SNAPSHOT));
    let mut samples = SampleScope::Nothing;
    if sample_interval.is_some() && !config.summaries_only {
        let loaded = load(ebpf, sockets, ids);
        let mut hook = hook("sample", sockets, loaded, NO_SAMPLES);
        if hook.note.is_none() {
            hook.programs.insert(0, "netlink:sock_diag".into());
            // The attempt needs a thread of its own.
            let trial = thread::Builder::new().spawn(netns::may_enter);
            if trial.is_ok_and(|trial| trial.join().unwrap_or(false)) {
                samples = SampleScope::EveryNamespace;
                if !Privileges::of_this_thread().has(SYS_PTRACE) {
                    hook.note = Some(SIMILAR_PROCESSES.into());
                }
            } else {
                samples = SampleScope::OwnNamespace;
                hook.note = Some(OWN_NAMESPACE.into());
            }
        }
        hooks.push(hook);
    }
    Started { hooks, samples }
}

/// Opens the iterator over the sockets of the calling thread's network namespace. A read runs it.
pub(super) fn open(ebpf: &mut Ebpf) -> Result<File, String> {
    // Only one of the two is loaded.
    let loaded = SOCKETS
        .into_iter()
        .find(|iter| ebpf.program(iter.program).is_some_and(|p| p.fd().is_ok()));
    open_iter(ebpf, loaded.ok_or("its program is not loaded")?)
}

/// Loads the program that [`visit_tasks`] runs.
pub(super) fn load_tasks(ebpf: &mut Ebpf, ids: &Ids) -> Result<(), String> {
    load(ebpf, TASKS, ids)
}

/// Visits all tasks, and returns how many the program counted.
pub(super) fn visit_tasks(ebpf: &mut Ebpf) -> Result<usize, String> {
    open_iter(ebpf, TASKS)
        .and_then(read_to_end)
        .map(|bytes| bytes.len())
}

pub(super) fn unload_tasks(ebpf: &mut Ebpf) {
    ebpf.program_mut(TASKS.program).map(unload);
}

/// Returns the processes of the caller's pid namespace: each number there, with its number in the
/// initial pid namespace.
pub(super) fn pids(ebpf: &mut Ebpf, ids: &Ids) -> Result<HashMap<u32, u32>, String> {
    let bytes = load(ebpf, PIDS, ids)
        .and_then(|()| open_iter(ebpf, PIDS))
        .and_then(read_to_end);
    ebpf.program_mut(PIDS.program).map(unload);
    let bytes = bytes?;
    let processes = bytes
        .chunks_exact(8)
        .map_while(|chunk| chunk.try_into().ok());
    Ok(processes.map(from_numbers).collect())
}

/// Returns the types of the iterators that a filter may need.
pub(super) fn targets_of_filters() -> [Target; 1] {
    // The other one is the same iterator.
    [TASKS.target()]
}

/// Returns the iterators of a tracer.
pub(super) fn programs(config: &Config) -> Vec<IterProgram> {
    let samples = config.sample_interval.is_some() && !config.summaries_only;
    let samples = samples.then(|| sockets(config.protocol));
    [files(config.protocol)]
        .into_iter()
        .chain(samples)
        .collect()
}

fn sockets(protocol: Protocol) -> IterProgram {
    match protocol {
        Protocol::Tcp => SOCKETS[0],
        Protocol::Udp => SOCKETS[1],
    }
}

/// Loads the program of an iterator, if it was not loaded ahead.
fn load(ebpf: &mut Ebpf, iter: IterProgram, ids: &Ids) -> Result<(), String> {
    let program = ebpf.program_mut(iter.program);
    let program = program.ok_or("the object does not have it")?;
    if program.fd().is_ok() {
        return Ok(());
    }
    let ids = ids::for_aya(ids, &[iter.target()]).map_err(|error| chain(&error))?;
    iter.load(program, &ids).map_err(|error| chain(&error))
}

fn open_iter(ebpf: &mut Ebpf, iter: IterProgram) -> Result<File, String> {
    let program = program(ebpf, iter).map_err(|error| chain(&error))?;
    let link = program
        .attach()
        .and_then(|link| program.take_link(link))
        .map_err(|error| chain(&error))?;
    link.into_file().map_err(|error| chain(&error))
}

fn program(ebpf: &mut Ebpf, iter: IterProgram) -> Result<&mut Iter, ProgramError> {
    ebpf.program_mut(iter.program)
        .ok_or(ProgramError::NotLoaded)?
        .try_into()
}

/// Reads an iterator to its end, and returns its bytes.
fn read_to_end(mut file: File) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            // The kernel pauses after a million objects.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn hook(signal: &str, iter: IterProgram, result: Result<(), String>, cost: &str) -> Hook {
    let mut hook = Hook {
        signal: signal.into(),
        programs: Vec::new(),
        note: None,
    };
    match result {
        Ok(()) => hook.programs.push(format!("iter:{}", iter.iterator)),
        Err(error) => hook.note = Some(format!("{cost}: {error}")),
    }
    hook
}
