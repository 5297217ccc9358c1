//! Loads, attaches and unloads one program.

use std::fs;

use aya::programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError};

use super::{
    btf::ids::{self, Ids},
    cgroup,
    plan::{HookPoint, function_of},
};

/// A file that exists if the kernel has kprobes. aya checks the same file.
const KPROBES: &str = "/sys/bus/event_source/devices/kprobe/type";

/// Returns whether the kernel has kprobes.
pub(super) fn has_kprobes() -> bool {
    fs::exists(KPROBES).unwrap_or(false)
}

/// Attaches a program, and loads it if necessary.
pub(super) fn attach_program(
    program: &mut Program,
    point: HookPoint,
    ids: &Ids,
) -> Result<(), ProgramError> {
    // The program may be loaded already: ahead, or for another hook.
    if program.fd().is_err() {
        if matches!(point, HookPoint::Kprobe(_) | HookPoint::Fexit(_)) {
            // Without kprobes, the kernel would load the program of a kprobe, but not attach it. It
            // has no fexit either, and the ids for the attempt take 4 MB.
            fs::metadata(KPROBES)?;
        }
        let ids = point.target().map(|target| ids::for_aya(ids, &[target]));
        let ids = ids.transpose()?;
        load(program, point, ids.as_ref())?;
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
        (Program::FEntry(program), HookPoint::Fentry(_)) => {
            program.attach()?;
        }
        (Program::FExit(program), HookPoint::Fexit(_)) => {
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

/// Loads a program. `ids` has the ids of the kernel's BTF, if the hook needs them.
pub(super) fn load(
    program: &mut Program,
    point: HookPoint,
    ids: Option<&aya::Btf>,
) -> Result<(), ProgramError> {
    match (program, point) {
        (Program::RawTracePoint(program), _) => program.load(),
        (Program::TracePoint(program), _) => program.load(),
        (Program::BtfTracePoint(program), HookPoint::BtfTracepoint(name)) => {
            program.load(name, ids.ok_or(ProgramError::NotLoaded)?)
        }
        (Program::KProbe(program), _) => program.load(),
        (Program::FEntry(program), HookPoint::Fentry(function)) => {
            program.load(function, ids.ok_or(ProgramError::NotLoaded)?)
        }
        (Program::FExit(program), HookPoint::Fexit(call)) => {
            program.load(&function_of(call), ids.ok_or(ProgramError::NotLoaded)?)
        }
        (Program::CgroupSock(program), _) => program.load(),
        (Program::CgroupSockAddr(program), _) => program.load(),
        (Program::CgroupSkb(program), _) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Unloads a program, if it is loaded.
pub(super) fn unload(program: &mut Program) {
    // The only possible error is that the program is not loaded.
    let _ = match program {
        Program::RawTracePoint(program) => program.unload(),
        Program::TracePoint(program) => program.unload(),
        Program::BtfTracePoint(program) => program.unload(),
        Program::KProbe(program) => program.unload(),
        Program::FEntry(program) => program.unload(),
        Program::FExit(program) => program.unload(),
        Program::CgroupSock(program) => program.unload(),
        Program::CgroupSockAddr(program) => program.unload(),
        Program::CgroupSkb(program) => program.unload(),
        Program::Iter(program) => program.unload(),
        _ => Ok(()),
    };
}
