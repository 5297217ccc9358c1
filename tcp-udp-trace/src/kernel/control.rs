//! Runs the programs that are attached nowhere, and that only user space runs.
//!
//! These programs read and write maps. A map system call would do the same, but while it is at
//! work, the kernel skips kprobe and classic tracepoint programs on that CPU.

use std::{
    io,
    time::{Duration, UNIX_EPOCH},
};

use aya::{
    Ebpf,
    programs::{
        Program, ProgramError, RawTracePoint, RawTracePointRunOptions, SchedClassifier,
        TestRun as _, TestRunOptions,
    },
};
use tcp_udp_trace_common::{FlowKey, FlowQuery};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::{
    event::Traffic,
    pipeline::{clock::BootClock, decode, flows::Totals},
};

/// Arms the wake-up by the next record.
pub(super) const ARM_WAKEUP: &str = "arm_wakeup";
/// Returns the totals of a flow.
pub(super) const QUERY_FLOW: &str = "query_flow";
/// Changes the filter, and answers questions about it.
pub(super) const CONTROL_FILTER: &str = "control_filter";
/// Returns the fill level of the ring. It is only in the object with a ring.
pub(super) const RING_FILL: &str = "ring_fill";
/// Reports the ends of TCP sockets that no hook saw.
pub(super) const CHECK_GONE: &str = "check_gone";
/// All of them.
pub(super) const CONTROL_PROGRAMS: [&str; 5] = [
    ARM_WAKEUP,
    QUERY_FLOW,
    CONTROL_FILTER,
    RING_FILL,
    CHECK_GONE,
];

/// Runs a program that takes no arguments, and returns its result.
pub(super) fn run(ebpf: &Ebpf, name: &str) -> io::Result<u32> {
    let program = ebpf.program(name).ok_or(ProgramError::NotLoaded);
    let program: Result<&RawTracePoint, _> = program.and_then(TryFrom::try_from);
    let answer = program.and_then(|program| program.test_run(RawTracePointRunOptions::default()));
    answer
        .map(|answer| answer.return_value)
        .map_err(io::Error::other)
}

/// Returns the totals of a flow, and the user of its socket, if the socket has this cookie.
pub(super) fn query_flow(
    ebpf: &Ebpf,
    flow: &FlowKey,
    cookie: Option<u64>,
    known: Traffic,
    forget: bool,
    time_offset: i64,
) -> Option<Totals> {
    let mut query = FlowQuery::new_zeroed();
    query.key = *flow;
    query.known.tx_packets = known.tx_packets;
    query.known.rx_packets = known.rx_packets;
    query.socket = cookie.unwrap_or(0);
    query.forget = u64::from(forget);
    let question = query;
    let mut options = TestRunOptions::new();
    options.data_in = Some(question.as_bytes());
    options.data_out = Some(query.as_mut_bytes());
    let program: &SchedClassifier = ebpf.program(QUERY_FLOW)?.try_into().ok()?;
    let answer = program.test_run(options).ok()?;
    // The wall clock does not matter here.
    let clock = BootClock::new(UNIX_EPOCH, Duration::ZERO).with_offset(time_offset);
    (answer.return_value == 1).then(|| Totals {
        traffic: decode::traffic(query.traffic),
        approximate: query.approximate != 0,
        local: Some(query.local),
        user: decode::user(&query.user, None, clock),
    })
}

/// Runs the program that controls the filter, and returns its result, which is not negative.
pub(super) fn control_filter(ebpf: &Ebpf, args: &[u64]) -> io::Result<i32> {
    run_with(ebpf, CONTROL_FILTER, args)
}

/// Reports the TCP socket at this address if it is gone. With address 0, reports a socket whose
/// address has another one, and returns whether there was one.
pub(super) fn check_gone(ebpf: &Ebpf, address: u64, search: u32) -> io::Result<bool> {
    Ok(run_with(ebpf, CHECK_GONE, &[address, search.into()])? != 0)
}

/// Runs a program with arguments, and returns its result, which is not negative.
fn run_with(ebpf: &Ebpf, name: &str, args: &[u64]) -> io::Result<i32> {
    let program: &RawTracePoint = ebpf
        .program(name)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryFrom::try_from)
        .map_err(io::Error::other)?;
    let mut options = RawTracePointRunOptions::new();
    options.args[..args.len()].copy_from_slice(args);
    let answer = program.test_run(options).map_err(io::Error::other)?;
    match answer.return_value.cast_signed() {
        error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        answer => Ok(answer),
    }
}

/// Loads a control program, if it is not loaded yet.
pub(super) fn load_control(program: &mut Program) -> Result<(), ProgramError> {
    if program.fd().is_ok() {
        return Ok(());
    }
    match program {
        Program::RawTracePoint(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
