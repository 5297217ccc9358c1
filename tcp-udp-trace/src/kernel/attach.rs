//! Carries out the attach plan: tries each choice in order.

use std::{io, thread};

use aya::{Ebpf, programs::ProgramError};

use super::{
    btf::ids::Ids,
    cgroup,
    errors::{self, chain},
    plan::{Abilities, Choice, HookPoint, Signal},
    private_mounts,
    privileges::Privileges,
    program::{attach_program, unload},
};
use crate::{
    error::{Error, ErrorKind, ResultExt as _},
    event::Protocol,
    hook::Hook,
};

/// Attaches every signal of `plan` in the best way that this kernel allows, and returns the hooks.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    plan: &[&Signal],
    abilities: Abilities,
    protocol: Protocol,
    ids: &Ids,
) -> Result<Vec<Hook>, Error> {
    // On a thread of its own, which may have a tracefs that the rest of the process does not see.
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .spawn_scoped(scope, || {
                let tracefs = private_mounts::make_tracefs_visible();
                if let Err(error) = &tracefs {
                    log::info!("no tracefs: {error}");
                }
                if protocol == Protocol::Udp && cgroup::root().is_err() {
                    if let Err(error) = private_mounts::mount_cgroup_v2() {
                        log::info!("no cgroup v2: {error}");
                    }
                }
                plan.iter()
                    .map(|signal| {
                        attach_signal(ebpf, signal, abilities, protocol, tracefs.is_ok(), ids)
                    })
                    .collect()
            })
            .or_error(ErrorKind::Load, "no thread to attach the hooks")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn attach_signal(
    ebpf: &mut Ebpf,
    signal: &Signal,
    abilities: Abilities,
    protocol: Protocol,
    has_tracefs: bool,
    ids: &Ids,
) -> Result<Hook, Error> {
    let mut hook = Hook {
        signal: signal.name.into(),
        programs: Vec::new(),
        note: None,
    };
    let mut refusal = None;
    for slot in signal.slots {
        let choices = slot
            .iter()
            .filter(|choice| !(choice.if_not_preempted && abilities.preempts_tracepoints));
        for choice in choices {
            // A program that an earlier slot has attached is no second program.
            if hook.programs.contains(&choice.hooks[0].1.to_string()) {
                continue;
            }
            let attached = if has_tracefs || !choice.needs_tracefs() {
                attach_choice(ebpf, choice, ids)
            } else {
                // aya is not called, because it would remember that there is no tracefs.
                unload_all(ebpf, choice);
                let error = io::Error::new(io::ErrorKind::NotFound, "no tracefs");
                Err((choice.hooks[0].1, error.into()))
            };
            match attached {
                Ok(attached) => {
                    hook.programs.extend(attached.programs);
                    let notes = hook.note.into_iter().chain(note(choice));
                    let notes: Vec<_> = notes.chain(attached.taken).collect();
                    hook.note = (!notes.is_empty()).then(|| notes.join("; "));
                    break;
                }
                Err((point, error)) if errors::is_resource_exhaustion(&error) => {
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

/// Returns the cost of a choice on this machine.
fn note(choice: &Choice) -> Option<String> {
    let is_cgroup = matches!(choice.hooks[0].1, HookPoint::Cgroup(_));
    if is_cgroup && cgroup::root().is_ok_and(|root| !root.is_whole) {
        return Some(cgroup::PARTIAL.into());
    }
    choice.cost.map(Into::into)
}

/// The attached part of a choice.
#[derive(Debug, Default)]
struct Attached {
    programs: Vec<String>,
    /// The costs of hooks that another program holds exclusively.
    taken: Vec<String>,
}

/// Attaches a choice: all of its hooks, or at least the first.
fn attach_choice(
    ebpf: &mut Ebpf,
    choice: &Choice,
    ids: &Ids,
) -> Result<Attached, (HookPoint, ProgramError)> {
    let mut attached = Attached::default();
    for (index, &(name, point)) in choice.hooks.iter().enumerate() {
        let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
        match program.and_then(|program| attach_program(program, point, ids)) {
            Ok(()) => attached.programs.push(point.to_string()),
            Err(error) if index == 0 || errors::is_resource_exhaustion(&error) => {
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

fn unload_all(ebpf: &mut Ebpf, choice: &Choice) {
    for (name, _) in choice.hooks {
        ebpf.program_mut(name).map(unload);
    }
}
