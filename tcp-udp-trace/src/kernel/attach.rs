//! Carries out the attach plan by trying.

use std::{
    collections::HashMap,
    error::Error as StdError,
    fs, io,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError},
};

use super::{
    btf::ids::{self, Ids},
    cgroup, errors,
    iter::Walk,
    plan::{Choice, HookPoint, Signal},
    private_mounts,
    privileges::Privileges,
};
use crate::{Error, ErrorKind, Hook, Protocol};

/// What the name of a system call's function begins with.
const OF_ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "__arm64_"
} else {
    "__x64_"
};

/// Attaches every signal of `plan` in the best way this kernel allows, and says which.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    plan: &[&Signal],
    protocol: Protocol,
) -> Result<Vec<Hook>, Error> {
    // In a thread of its own, which may look at a tracefs that the rest of the process does not have.
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .spawn_scoped(scope, || {
                let tracefs = private_mounts::make_tracefs_visible();
                if let Err(error) = &tracefs {
                    log::info!("no tracefs: {error}");
                }
                plan.iter()
                    .map(|signal| attach_signal(ebpf, signal, protocol, tracefs.is_ok()))
                    .collect()
            })
            .map_err(|source| {
                Error::new(ErrorKind::Load, "no thread to attach the hooks").with_source(source)
            })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn attach_signal(
    ebpf: &mut Ebpf,
    signal: &Signal,
    protocol: Protocol,
    has_tracefs: bool,
) -> Result<Hook, Error> {
    let mut hook = Hook {
        signal: signal.name.into(),
        programs: Vec::new(),
        note: None,
    };
    let mut refusal = None;
    for slot in signal.slots {
        for choice in *slot {
            let attached = if has_tracefs || !choice.needs_tracefs() {
                attach_choice(ebpf, choice)
            } else {
                // Not asked, aya does not remember that there was none.
                unload_all(ebpf, choice);
                let error = io::Error::new(io::ErrorKind::NotFound, "no tracefs");
                Err((choice.hooks[0].1, error.into()))
            };
            match attached {
                Ok(attached) => {
                    hook.programs.extend(attached.programs);
                    let note = hook.note.or_else(|| note(choice));
                    let notes: Vec<_> = note.into_iter().chain(attached.taken).collect();
                    hook.note = (!notes.is_empty()).then(|| notes.join("; "));
                    break;
                }
                Err((point, error)) if errors::is_want(&error) => {
                    return Err(
                        errors::of_hook(&error, signal.name, point, protocol).with_source(error)
                    );
                }
                Err((point, error)) => {
                    log::debug!("{point}: {}", chain(&error));
                    refusal.get_or_insert((point, error));
                }
            }
        }
    }
    match refusal {
        Some((point, error)) if hook.programs.is_empty() && signal.required => {
            Err(errors::of_hook(&error, signal.name, point, protocol).with_source(error))
        }
        Some((_, error)) if hook.programs.is_empty() => {
            hook.note = Some(format!(
                "the kernel allows none of its hooks: {}",
                chain(&error)
            ));
            Ok(hook)
        }
        _ => Ok(hook),
    }
}

/// What this choice costs here.
fn note(choice: &Choice) -> Option<String> {
    let is_cgroup = matches!(choice.hooks[0].1, HookPoint::Cgroup(_));
    if is_cgroup && cgroup::root().is_ok_and(|root| !root.is_whole) {
        return Some(cgroup::PARTIAL.into());
    }
    choice.cost.map(Into::into)
}

/// What was attached of a choice.
#[derive(Debug, Default)]
struct Attached {
    programs: Vec<String>,
    /// The hooks that another program has alone, and what that costs.
    taken: Vec<String>,
}

/// Attaches a choice: all of its hooks, or at least the first.
fn attach_choice(ebpf: &mut Ebpf, choice: &Choice) -> Result<Attached, (HookPoint, ProgramError)> {
    let mut attached = Attached::default();
    for (index, &(name, point)) in choice.hooks.iter().enumerate() {
        let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
        match program.and_then(|program| attach_program(program, point)) {
            Ok(()) => attached.programs.push(point.to_string()),
            Err(error) if index == 0 || errors::is_want(&error) => {
                unload_all(ebpf, choice);
                return Err((point, error));
            }
            Err(error) => {
                log::debug!("{point}: {}", chain(&error));
                let taken = errors::is_taken(point, &error, &Privileges::of_this_thread());
                attached
                    .taken
                    .extend(taken.then(|| errors::cost_of_taken(point)));
            }
        }
    }
    Ok(attached)
}

pub(super) fn attach_program(program: &mut Program, point: HookPoint) -> Result<(), ProgramError> {
    // It may be there already: loaded ahead, or for another hook.
    if program.fd().is_err() {
        load(program, point, None)?;
    }
    match (program, point) {
        (Program::RawTracePoint(program), HookPoint::RawTracepoint(name)) => {
            program.attach(name)?;
        }
        (Program::TracePoint(program), HookPoint::Tracepoint(category, name)) => {
            program.attach(category, name)?;
        }
        (Program::BtfTracePoint(program), HookPoint::BtfTracepoint(_)) => {
            program.attach()?;
        }
        (Program::KProbe(program), HookPoint::Kprobe(function)) => {
            program.attach(function, 0)?;
        }
        (Program::KProbe(program), HookPoint::Kretprobe(function)) => {
            program.attach(format!("{OF_ARCHITECTURE}{function}"), 0)?;
        }
        (Program::FEntry(program), HookPoint::Fentry(_)) => {
            program.attach()?;
        }
        (Program::CgroupSock(program), HookPoint::Cgroup(_)) => {
            program.attach(cgroup::root()?.folder, CgroupAttachMode::Single)?;
        }
        (Program::CgroupSockAddr(program), HookPoint::Cgroup(_)) => {
            program.attach(cgroup::root()?.folder, CgroupAttachMode::Single)?;
        }
        (Program::CgroupSkb(program), HookPoint::Cgroup(_)) => {
            program.attach(
                cgroup::root()?.folder,
                CgroupSkbAttachType::Egress,
                CgroupAttachMode::Single,
            )?;
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    }
    Ok(())
}

/// Loads a program. What aya must know of the kernel's BTF for that is in `ids`, or looked up.
fn load(
    program: &mut Program,
    point: HookPoint,
    ids: Option<&aya::Btf>,
) -> Result<(), ProgramError> {
    let looked_up;
    let ids = match (ids, point.target()) {
        (None, Some(target)) => {
            looked_up = ids::look_up(target)?;
            Some(&looked_up)
        }
        (ids, _) => ids,
    };
    match (program, point) {
        (Program::RawTracePoint(program), _) => program.load(),
        (Program::TracePoint(program), _) => program.load(),
        (Program::BtfTracePoint(program), HookPoint::BtfTracepoint(name)) => {
            program.load(name, ids.ok_or(ProgramError::NotLoaded)?)
        }
        (Program::KProbe(program), _) => {
            // The kernel would load it, and then not attach it.
            fs::metadata(KPROBES)?;
            program.load()
        }
        (Program::FEntry(program), HookPoint::Fentry(function)) => {
            program.load(function, ids.ok_or(ProgramError::NotLoaded)?)
        }
        (Program::CgroupSock(program), _) => program.load(),
        (Program::CgroupSockAddr(program), _) => program.load(),
        (Program::CgroupSkb(program), _) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Loads what will probably be attached, on every CPU at once: most of a start is the kernel's verifier at work. What fails here is tried again when it
/// is its turn, and then it is told why.
pub(super) fn load_ahead(
    ebpf: &mut Ebpf,
    plan: &[&Signal],
    walks: &[Walk],
    questions: &[&str],
    ids: &Ids,
) {
    let mut programs: HashMap<_, _> = ebpf.programs_mut().collect();
    let has_kprobes = fs::exists(KPROBES).unwrap_or(false);
    let is_likely = |choice: &&Choice| match choice.hooks[0].1 {
        HookPoint::Kprobe(_) | HookPoint::Kretprobe(_) => has_kprobes,
        // It is what is taken where nothing else is to be had.
        HookPoint::Fentry(_) => false,
        _ => true,
    };
    let slots = plan.iter().flat_map(|signal| signal.slots);
    let hooks = slots
        .filter_map(|slot| slot.iter().find(is_likely))
        .flat_map(|choice| choice.hooks);
    let hooks = hooks.filter_map(|(name, point)| Some((*point, programs.remove(name)?)));
    let (with_ids, others): (Vec<_>, Vec<_>) =
        hooks.partition(|(point, _)| point.target().is_some());
    let mut take = |name: &&str| programs.remove(*name);
    let questions: Vec<_> = questions.iter().filter_map(&mut take).collect();
    let walks: Vec<_> = walks
        .iter()
        .filter_map(|walk| Some((walk, take(&walk.program)?)))
        .collect();
    // To make the ids takes as long as to load a program, so it is one of the jobs.
    let load_with_ids = || {
        let Ok(ids) = ids::for_aya(ids) else {
            return;
        };
        for (point, program) in with_ids {
            let _ = load(program, point, Some(&ids));
        }
        for (walk, program) in walks {
            let _ = walk.load(program, &ids);
        }
    };
    let mut jobs: Vec<Box<dyn FnOnce() + Send>> = vec![Box::new(load_with_ids)];
    for (point, program) in others {
        jobs.push(Box::new(move || drop(load(program, point, None))));
    }
    for program in questions {
        jobs.push(Box::new(move || drop(load_question(program))));
    }
    let threads = jobs
        .len()
        .min(thread::available_parallelism().map_or(1, usize::from));
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(job) = next() {
            job();
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without that thread it takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

/// Loads a program that is attached nowhere, but run by us.
pub(super) fn load_question(program: &mut Program) -> Result<(), ProgramError> {
    if program.fd().is_ok() {
        return Ok(());
    }
    match program {
        Program::RawTracePoint(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// What the kernel has if it has kprobes; aya asks the same.
const KPROBES: &str = "/sys/bus/event_source/devices/kprobe/type";

fn unload_all(ebpf: &mut Ebpf, choice: &Choice) {
    for (name, _) in choice.hooks {
        ebpf.program_mut(name).map(unload);
    }
}

/// Takes a program out of the kernel, if it is there.
pub(super) fn unload(program: &mut Program) {
    // The only error is that it is not there.
    let _ = match program {
        Program::RawTracePoint(program) => program.unload(),
        Program::TracePoint(program) => program.unload(),
        Program::BtfTracePoint(program) => program.unload(),
        Program::KProbe(program) => program.unload(),
        Program::FEntry(program) => program.unload(),
        Program::CgroupSock(program) => program.unload(),
        Program::CgroupSockAddr(program) => program.unload(),
        Program::CgroupSkb(program) => program.unload(),
        Program::Iter(program) => program.unload(),
        _ => Ok(()),
    };
}

/// An error and its sources, in one line.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut line = error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(": ");
        line.push_str(error.to_string().lines().next().unwrap_or_default());
        source = error.source();
    }
    line
}
