//! The rim to the kernel, and the only place that names aya: loads the eBPF object with the offsets of this
//! kernel, attaches it by the plan, and hands out raw records and counts.

mod attach;
mod btf;
mod btf_ids;
mod cgroup;
mod filter;
mod mounts;
mod names;
mod needs;
mod offsets;
mod perf;
mod plan;
mod privileges;
mod refusal;
mod ring;
mod walk;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::{Duration, UNIX_EPOCH},
};

pub(crate) use self::{ring::Ring, walk::SampleScope};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, MapError, PerCpuArray},
    programs::{
        ProgramError, RawTracePoint, RawTracePointRunOptions, SchedClassifier, TestRun as _,
        TestRunOptions,
    },
};
use aya_log::EbpfLogger;
use log::Log;
use tcp_udp_trace_common::{Counters, FlowKey, FlowQuery, Udp, kind};
use zerocopy::{FromZeros as _, IntoBytes as _};

use self::filter::{ASK_FILTER, Filters};
use crate::{
    Buffer, Error, ErrorKind, Event, Filter, Hook, Protocol, Traffic,
    builder::{Config, LATE_SHARE},
    decode,
    flows::{FlowMap, Totals},
    time::{BootClock, namespace_offset},
};

/// The eBPF objects of this architecture, as `cargo xtask ebpf` made them: with a ring buffer, and with perf buffers.
#[cfg(target_arch = "x86_64")]
static OBJECTS: Option<[&[u8]; 2]> = Some([
    aya::include_bytes_aligned!("../../bpf/tcp-udp-trace.x86_64.o"),
    aya::include_bytes_aligned!("../../bpf/tcp-udp-trace-perf.x86_64.o"),
]);

/// See above.
#[cfg(target_arch = "aarch64")]
static OBJECTS: Option<[&[u8]; 2]> = Some([
    aya::include_bytes_aligned!("../../bpf/tcp-udp-trace.aarch64.o"),
    aya::include_bytes_aligned!("../../bpf/tcp-udp-trace-perf.aarch64.o"),
]);

/// None for this architecture.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
static OBJECTS: Option<[&[u8]; 2]> = None;

/// No ring can be smaller.
const MIN_RING_BYTES: u32 = 4096;

/// The share of the ring that may fill before the reader is woken though it did not ask; and of which the last is kept for the records that
/// matter most.
const SHARE: u32 = 8;

/// How many flows that the filter does not want are remembered.
const UNWANTED: u32 = 16_384;

/// The programs that are run by us rather than by the kernel: they read and write maps without a system call that does, because that
/// would keep the kernel from running others.
const ASK_ARM: &str = "ask_arm";
const ASK_FLOW: &str = "ask_flow";
/// Only in the object with a ring.
const RING_FILL: &str = "ring_fill";
const QUESTIONS: [&str; 4] = [ASK_ARM, ASK_FLOW, ASK_FILTER, RING_FILL];

/// Programs and maps in the kernel, and what they are attached to. Dropping it removes everything.
pub(crate) struct Kernel {
    ebpf: Ebpf,
    hooks: Vec<Hook>,
    sample_scope: SampleScope,
    counters: Array<MapData, [u64; size_of::<Counters>() / 8]>,
    rejected: PerCpuArray<MapData, u64>,
    protocol: Protocol,
    filters: Filters,
    log: Option<EbpfLogger<&'static dyn Log>>,
    /// The last answer of the kernel, which it gives only while the programs are loaded.
    recursion_misses: Option<u64>,
    /// Of this process's time namespace.
    pub(crate) time_offset: i64,
}

impl Kernel {
    /// Loads and attaches everything. Blocks for some milliseconds.
    pub(crate) fn start(config: &Config) -> Result<(Self, Ring), Error> {
        let Some([with_ring, with_perf]) = OBJECTS else {
            let what = format!("there is no eBPF object for {} yet", std::env::consts::ARCH);
            return Err(Error::new(ErrorKind::Unsupported, what));
        };
        needs::check(config.protocol)?;
        let plan = plan::wanted(config);
        let walks = walk::wanted(config);
        let (offsets, ids, images, has_listened, drop_reasons, registers) = {
            let vmlinux = offsets::read_btf()?;
            let btf = offsets::parse(&vmlinux)?;
            let targets = plan.iter().flat_map(|signal| signal.targets());
            let targets = targets.chain(walks.iter().map(|walk| walk.target()));
            let verifies = match config.protocol {
                Protocol::Tcp => offsets::verifies_images(&btf),
                Protocol::Udp => offsets::verifies_images_of_udp(&btf),
            };
            let images = config.process_details && verifies;
            (
                offsets::resolve(&btf)?,
                btf_ids::find(&btf, targets),
                images,
                offsets::has_listened(&btf),
                offsets::drop_reasons(&btf),
                offsets::registers(&btf),
            )
        };
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| {
            Error::new(
                ErrorKind::Unsupported,
                format!("cannot read {path}: is /sys mounted?"),
            )
            .with_source(source)
        })?;
        // Every map of the object is made; those of the other protocol as small as can be.
        let (tcp_sockets, udp_sockets, flows, unwanted) = match config.protocol {
            Protocol::Tcp => (config.max_sockets, 1, 1, 1),
            // Each CPU may be about to put one more together.
            Protocol::Udp => (
                1,
                config.max_sockets + cpus as u32,
                config.max_flows + flows_on_their_way(config.ring_bytes),
                config.max_flows.min(UNWANTED),
            ),
        };
        let interval = u64::try_from(config.interval.as_nanos()).unwrap_or(u64::MAX);
        let buffer = config.buffer.unwrap_or_else(ring::best);
        let mut questions = vec![ASK_ARM, ASK_FILTER];
        questions.extend((buffer == Buffer::Ring).then_some(RING_FILL));
        questions.extend((config.protocol == Protocol::Udp).then_some(ASK_FLOW));
        // As the loader rounds it.
        let ring_bytes = config.ring_bytes.next_power_of_two();
        let wake_shift = (ring_bytes / SHARE).ilog2();
        let (object, events) = match buffer {
            Buffer::Ring => (with_ring, ring_bytes),
            Buffer::Perf => (with_perf, cpus as u32),
        };
        let mut loader = loader();
        if buffer == Buffer::Ring {
            loader.map_max_entries("LATE", (ring_bytes / LATE_SHARE).max(MIN_RING_BYTES));
        }
        for (name, reason) in &drop_reasons {
            loader.override_global(name, reason, true);
        }
        let mut ebpf = loader
            .override_global("OFFSETS", &offsets[..], true)
            .override_global("CPUS", &(cpus as u64), true)
            .override_global("WAKE_SHIFT", &wake_shift, buffer == Buffer::Ring)
            .override_global("INTERVAL", &interval, true)
            .override_global("PER_DATAGRAM", &u8::from(config.per_datagram), true)
            .override_global("HAS_LISTENED", &has_listened, true)
            .override_global("REGISTERS", &registers, true)
            .override_global("IMAGES", &u8::from(images), true)
            .map_max_entries("EVENTS", events)
            .map_max_entries("SEEN", if images { 4096 } else { 1 })
            .map_max_entries("SOCKETS", tcp_sockets)
            .map_max_entries("UDP_SOCKETS", udp_sockets)
            .map_max_entries("FLOWS", flows)
            .map_max_entries("UNWANTED", unwanted)
            .load(object)
            .map_err(|source| refusal::of_map(&source, config.protocol).with_source(source))?;
        let log = (buffer == Buffer::Ring).then(|| EbpfLogger::init(&mut ebpf));
        let log = log.transpose().map_err(|source| {
            Error::new(ErrorKind::Load, "cannot read the programs' log").with_source(source)
        })?;
        // Not while the maps are made: who runs out of memory meanwhile is killed, where the maker of a map gets an error.
        attach::load_ahead(&mut ebpf, &plan, &walks, &questions, &ids);
        let ring = Ring::open(&mut ebpf, buffer, config)?;
        let counters = take_map(&mut ebpf, "COUNTERS", Array::try_from)?;
        let rejected = take_map(&mut ebpf, "REJECTED", PerCpuArray::try_from)?;
        for name in questions {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
            program.and_then(attach::load_question).map_err(|source| {
                refusal::of_program(&source, "a program that the reader asks", config.protocol)
                    .with_source(source)
            })?;
        }
        // Before the first event.
        let mut filters = Filters::default();
        filters.install(&mut ebpf, &config.filter, config.protocol)?;
        let mut hooks = attach::attach(&mut ebpf, &plan, config.protocol)?;
        if !tells_local(&hooks) {
            let mut hides_local = take_map(&mut ebpf, "HIDES_LOCAL", Array::<_, u32>::try_from)?;
            hides_local.set(0, u32::MAX, 0).map_err(|source| {
                Error::new(ErrorKind::Load, "cannot write to a map").with_source(source)
            })?;
        }
        // Only now: a socket made meanwhile has met the hooks.
        let walks = walk::start(&mut ebpf, config);
        hooks.extend(walks.hooks);
        hooks.push(ring::hook(buffer));
        Ok((
            Self {
                ebpf,
                hooks,
                sample_scope: walks.samples,
                counters,
                rejected,
                protocol: config.protocol,
                filters,
                log,
                recursion_misses: None,
                // The file tells the namespace of the children, which is that of a process that was started in its own.
                time_offset: namespace_offset(
                    &fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default(),
                ),
            },
            ring,
        ))
    }

    pub(crate) fn hooks(&self) -> &[Hook] {
        &self.hooks
    }

    pub(crate) fn sample_scope(&self) -> SampleScope {
        self.sample_scope
    }

    /// See [`Shared::walk`](crate::reader::Shared::walk).
    pub(crate) fn walk(&mut self) -> io::Result<File> {
        walk::open(&mut self.ebpf).map_err(io::Error::other)
    }

    /// Asks to be woken by the next record; gives how many records the ring has refused so far, modulo 2³².
    pub(crate) fn arm(&self) -> io::Result<u32> {
        self.run(ASK_ARM)
    }

    /// How many eighths of the ring are filled.
    pub(crate) fn ring_fill(&self) -> Option<u32> {
        self.run(RING_FILL).ok()
    }

    /// Runs a program that takes no arguments, and returns its result.
    fn run(&self, name: &str) -> io::Result<u32> {
        let program = self.ebpf.program(name).ok_or(ProgramError::NotLoaded);
        let program: Result<&RawTracePoint, _> = program.and_then(TryFrom::try_from);
        let answer =
            program.and_then(|program| program.test_run(RawTracePointRunOptions::default()));
        answer
            .map(|answer| answer.return_value)
            .map_err(io::Error::other)
    }

    /// Asks for the totals of a flow.
    fn ask_flow(
        &self,
        flow: &FlowKey,
        cookie: Option<u64>,
        known: Traffic,
        forget: bool,
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
        let program: &SchedClassifier = self.ebpf.program(ASK_FLOW)?.try_into().ok()?;
        let answer = program.test_run(options).ok()?;
        // The wall clock does not matter here.
        let clock = BootClock::new(UNIX_EPOCH, Duration::ZERO).with_offset(self.time_offset);
        (answer.return_value == 1).then(|| Totals {
            traffic: decode::traffic(query.traffic),
            approximate: query.approximate != 0,
            local: Some(query.local),
            user: decode::user(&query.user, None, clock),
        })
    }

    /// What the programs have counted.
    pub(crate) fn counters(&self) -> Counters {
        // A lookup in an array cannot fail; if it did, the counts of before would be the best answer too.
        self.counters.get(&0, 0).map_or_else(
            |_| Counters::default(),
            |counts| zerocopy::transmute!(counts),
        )
    }

    /// How many records of each kind the filters have kept from being made.
    pub(crate) fn rejected(&self) -> [u64; kind::COUNT] {
        std::array::from_fn(|kind| {
            // While there was no filter, no map need be read.
            let counts = self
                .filters
                .were_used()
                .then(|| self.rejected.get(&(kind as u32), 0));
            // As for the counters.
            counts
                .and_then(Result::ok)
                .map_or(0, |cpus| cpus.iter().sum())
        })
    }

    /// See [`TracerHandle::set_filter`](crate::TracerHandle::set_filter).
    pub(crate) fn set_filter(&mut self, filter: &Filter) -> Result<(), Error> {
        self.filters.install(&mut self.ebpf, filter, self.protocol)
    }

    /// Whether the filter lets an event of UDP pass that user space made.
    pub(crate) fn wants(&self, event: &Event) -> bool {
        self.filters.want(&self.ebpf, event)
    }

    /// Whether the filter lets the end of a UDP socket pass whose flows it lets pass.
    pub(crate) fn wants_end_of_flows(&self, event: &Event) -> bool {
        self.filters.want_but_ends(&self.ebpf, event)
    }

    /// How often the kernel skipped a program that was already active on the CPU, where it tells.
    pub(crate) fn recursion_misses(&self) -> Option<u64> {
        let loaded = self
            .ebpf
            .programs()
            .filter(|(name, _)| !QUESTIONS.contains(name))
            .filter_map(|(_, program)| {
                let fd = program.fd().ok()?.as_fd().as_raw_fd();
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
                let misses = info
                    .lines()
                    .find_map(|line| line.strip_prefix("recursion_misses:"))?;
                misses.trim().parse::<u64>().ok()
            })
            .reduce(|a, b| a + b);
        loaded.or(self.recursion_misses)
    }

    /// Passes what the programs had to say to the `log` crate.
    pub(crate) fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Takes the programs out of the kernel; the maps, and so the records already made, stay.
    ///
    /// Blocks until the kernel is sure that no CPU runs them any more. It waits for that at each tracepoint, for up
    /// to 0.1 s; so they go in parallel.
    pub(crate) fn detach(&mut self) {
        self.recursion_misses = self.recursion_misses();
        let stopping = self.ebpf.map_mut("STOPPING").map(Array::try_from);
        if let Some(Ok(mut stopping)) = stopping {
            // It cannot fail for an array; and if it did, some closes would be said to have been missed.
            let _ = stopping.set(0, 1_u32, 0);
        }
        thread::scope(|scope| {
            for (name, program) in self.ebpf.programs_mut() {
                if program.fd().is_err() || QUESTIONS.contains(&name) {
                    continue;
                }
                // Where no thread can be had, dropping `ebpf` does it, one after the other.
                let _ = thread::Builder::new().spawn_scoped(scope, || attach::unload(program));
            }
        });
    }
}

/// How many flows may have begun of which the reader does not know yet. Each has a record in the buffer.
fn flows_on_their_way(ring_bytes: u32) -> u32 {
    const MOST: u32 = 16_384;
    (ring_bytes / size_of::<Udp>() as u32).min(MOST)
}

/// Asks everything of a BTF that may be anything: for the fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) fn ask_btf(bytes: &[u8]) -> Result<(), Error> {
    let btf = offsets::parse(bytes)?;
    let targets = ["task_file", "tcp"].map(btf_ids::Target::iterator);
    let ids = btf_ids::for_aya(&btf_ids::find(&btf, targets));
    assert!(ids.is_ok(), "aya does not take what we made for it");
    offsets::resolve(&btf).map(|_| ())
}

/// Whether the receive hook tells at which of its addresses a socket was reached.
fn tells_local(hooks: &[Hook]) -> bool {
    let receive = hooks.iter().filter(|hook| hook.signal == "receive");
    let mut programs = receive.flat_map(|hook| &hook.programs);
    programs.any(|program| program.ends_with(":skb_consume_udp"))
}

impl FlowMap for Kernel {
    fn totals(&self, flow: &FlowKey, cookie: Option<u64>, known: Traffic) -> Option<Totals> {
        self.ask_flow(flow, cookie, known, false)
    }

    fn take(&mut self, flow: &FlowKey, cookie: Option<u64>) -> Option<Totals> {
        self.ask_flow(flow, cookie, Traffic::default(), true)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.detach();
    }
}

/// A loader that does not know the kernel's BTF, as far as that can be had.
///
/// aya's loader begins by reading all of it, which takes most of the time and memory of a start, and nothing in our objects refers to it.
fn loader<'a>() -> EbpfLoader<'a> {
    let without_btf = || {
        if let Err(error) = mounts::hide_btf() {
            log::debug!("the kernel's BTF cannot be hidden from the loader: {error}");
        }
        EbpfLoader::new()
    };
    let thread = thread::Builder::new().spawn(without_btf);
    let made = thread.ok().and_then(|thread| thread.join().ok());
    made.unwrap_or_default()
}

fn take_map<M>(
    ebpf: &mut Ebpf,
    name: &str,
    convert: impl FnOnce(aya::maps::Map) -> Result<M, MapError>,
) -> Result<M, Error> {
    let missing = || {
        Error::new(
            ErrorKind::Load,
            format!("the eBPF object has no usable map {name}"),
        )
    };
    let map = ebpf.take_map(name).ok_or_else(missing)?;
    convert(map).map_err(|source| missing().with_source(source))
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("hooks", &self.hooks)
            .finish_non_exhaustive()
    }
}
