//! Loads the eBPF object with the offsets of this kernel, attaches its programs by the plan, and
//! gives access to records and counters. This is the only module that names aya.

mod attach;
mod btf;
pub(crate) mod cgroup;
mod control;
mod errors;
mod filter;
mod iter;
mod links;
mod maps;
mod names;
mod perf;
mod plan;
mod preflight;
mod preload;
mod private_mounts;
mod privileges;
mod program;
mod ring;

use std::{
    env,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::Arc,
    thread,
};

pub(crate) use self::{iter::SampleScope, maps::TcpSockets, ring::Ring};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, PerCpuArray},
    programs::ProgramError,
};
use aya_log::EbpfLogger;
use log::Log;
use tcp_udp_trace_common::{Counters, FlowKey, Offsets, hold, kind};

use self::{
    btf::{
        ids::{self, Ids},
        offsets,
        source::Source,
    },
    control::{ARM_WAKEUP, CHECK_GONE, CONTROL_FILTER, CONTROL_PROGRAMS, QUERY_FLOW, RING_FILL},
    filter::{Filters, NetworkWriter},
    iter::IterProgram,
    links::CgroupLinks,
    maps::{SHARE, set_variable, take_map},
    plan::{Abilities, Signal},
};
use crate::{
    config::{Buffer, Config},
    error::{Error, ErrorKind, ResultExt as _},
    event::{Event, Protocol, Traffic, reset_reason},
    filter::Filter,
    hook::Hook,
    pipeline::{
        clock::namespace_offset,
        flows::{FlowMap, Totals},
    },
};

/// The eBPF object with a ring buffer. `cargo xtask ebpf` makes it.
static WITH_RING: &[u8] = aya::include_bytes_aligned!("../../bpf/tcp-udp-trace.o");

/// The eBPF object with perf buffers.
static WITH_PERF: &[u8] = aya::include_bytes_aligned!("../../bpf/tcp-udp-trace-perf.o");

/// The programs and maps in the kernel, and their attachments. A drop removes all of them.
pub(crate) struct Kernel {
    ebpf: Ebpf,
    hooks: Vec<Hook>,
    cgroup_links: CgroupLinks,
    sample_scope: SampleScope,
    counters: Array<MapData, [u64; size_of::<Counters>() / 8]>,
    rejected: PerCpuArray<MapData, u64>,
    protocol: Protocol,
    /// The TCP sockets that the programs remember, if the tracer looks for those that are gone.
    tcp_sockets: Option<Arc<TcpSockets>>,
    filters: Filters,
    log: Option<EbpfLogger<&'static dyn Log>>,
    /// The last value from the kernel, which the kernel shows only while the programs are loaded.
    recursion_misses: Option<u64>,
    /// The offset of this process's time namespace.
    pub(crate) time_offset: i64,
}

/// The facts in the BTF of the running kernel.
struct Facts {
    offsets: Offsets,
    ids: Ids,
    abilities: Abilities,
    /// Whether the programs report the images of processes.
    images: bool,
    ancestor_ids: u8,
    has_listened: u64,
    bitfields: [(&'static str, u8); 2],
    drop_reasons: [(&'static str, u32); 3],
    registers: u64,
    types_task: bool,
    allocates_on_demand: bool,
    ring_buffer_sleeps: bool,
    networks: NetworkWriter,
}

impl Facts {
    /// Reads the BTF, whose memory is free again afterwards.
    fn read(config: &Config, plan: &[&Signal], iters: &[IterProgram]) -> Result<Self, Error> {
        let source = Source::read(config.btf.as_deref())?;
        let btf = source.parse()?;
        let abilities = Abilities {
            has_kprobes: program::has_kprobes(),
            preempts_tracepoints: offsets::preempts_tracepoints(&btf),
        };
        let targets = plan.iter().flat_map(|signal| signal.targets());
        let targets = targets.chain(iters.iter().map(|iter| iter.target()));
        let targets = targets.chain(iter::targets_of_filters());
        let verifies = match config.protocol {
            Protocol::Tcp => offsets::verifies_images(&btf),
            Protocol::Udp => offsets::verifies_images_of_udp(&btf),
        };
        if config.resets {
            reset_reason::set_names(|| offsets::reset_reasons(&btf));
        }
        Ok(Self {
            offsets: offsets::resolve(&btf)?,
            ids: ids::find(&btf, targets),
            abilities,
            images: config.process_details && verifies,
            ancestor_ids: offsets::ancestor_ids(&btf),
            has_listened: offsets::has_listened(&btf),
            bitfields: offsets::bitfields(&btf),
            drop_reasons: offsets::drop_reasons(&btf),
            registers: offsets::registers(&btf),
            types_task: offsets::types_task(&btf),
            allocates_on_demand: offsets::allocates_on_demand(&btf),
            ring_buffer_sleeps: offsets::ring_buffer_sleeps(&btf),
            networks: if offsets::networks_sleep(&btf) {
                NetworkWriter::SystemCall
            } else {
                NetworkWriter::Program
            },
        })
    }
}

impl Kernel {
    /// Loads and attaches everything. Blocks for some milliseconds.
    pub(crate) fn start(config: &Config) -> Result<(Self, Ring), Error> {
        if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            let message = format!("the eBPF programs do not support {} yet", env::consts::ARCH);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        preflight::check(config.protocol)?;
        let plan = plan::signals(config);
        let iters = iter::programs(config);
        let facts = Facts::read(config, &plan, &iters)?;
        let likely = plan.iter();
        let likely = likely.flat_map(|signal| signal.likely(facts.abilities));
        let likely: Vec<_> = likely.collect();
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| {
            Error::new(
                ErrorKind::Unsupported,
                format!("cannot read {path}: is /sys mounted?"),
            )
            .with_source(source)
        })?;
        let interval = u64::try_from(config.interval.as_nanos()).unwrap_or(u64::MAX);
        let buffer = ring::choose(config.buffer, facts.ring_buffer_sleeps)?;
        let mut controls = vec![ARM_WAKEUP, CONTROL_FILTER];
        controls.extend((buffer == Buffer::Ring).then_some(RING_FILL));
        controls.extend((config.protocol == Protocol::Udp).then_some(QUERY_FLOW));
        let finds_gone = config.protocol == Protocol::Tcp && config.sample_interval.is_some();
        controls.extend(finds_gone.then_some(CHECK_GONE));
        // The loader rounds the size in the same way.
        let ring_bytes = config.ring_bytes.next_power_of_two();
        let wake_shift = (ring_bytes / SHARE).ilog2();
        let (object, events) = match buffer {
            Buffer::Ring => (WITH_RING, ring_bytes),
            Buffer::Perf => (WITH_PERF, cpus as u32),
        };
        let mut loader = loader();
        for (name, entries) in maps::sizes(config, ring_bytes, cpus as u32) {
            loader.map_max_entries(name, entries);
        }
        for (name, reason) in &facts.drop_reasons {
            loader.override_global(name, reason, true);
        }
        for (name, bits) in &facts.bitfields {
            loader.override_global(name, bits, true);
        }
        let mut ebpf = loader
            .override_global("OFFSETS", &facts.offsets[..], true)
            .override_global("CPUS", &(cpus as u64), true)
            .override_global("WAKE_SHIFT", &wake_shift, buffer == Buffer::Ring)
            .override_global("MAX_SOCKETS", &config.max_sockets, true)
            .override_global("INTERVAL", &interval, true)
            .override_global("PER_DATAGRAM", &u8::from(config.per_datagram), true)
            .override_global("HAS_LISTENED", &facts.has_listened, true)
            .override_global("ANCESTOR_IDS", &facts.ancestor_ids, true)
            .override_global("ONLY_ENDS", &u8::from(config.summaries_only), true)
            .override_global("AARCH64", &u8::from(cfg!(target_arch = "aarch64")), true)
            .override_global("REGISTERS", &facts.registers, true)
            .override_global("TYPED", &u8::from(facts.types_task), true)
            .override_global("IMAGES", &u8::from(facts.images), true)
            .map_max_entries("EVENTS", events)
            .map_max_entries("SEEN", if facts.images { 4096 } else { 1 })
            .load(&maps::with_allocation(object, facts.allocates_on_demand))
            .map_err(|source| errors::of_map(&source, config.protocol).with_source(source))?;
        let log = (buffer == Buffer::Ring).then(|| EbpfLogger::init(&mut ebpf));
        let log = log
            .transpose()
            .or_error(ErrorKind::Load, "cannot read the programs' log")?;
        // Not at the same time as the maps: when memory runs out, the kernel kills a process that
        // loads programs, but returns an error to one that makes a map.
        preload::load_ahead(&mut ebpf, &likely, &iters, &controls, &facts.ids);
        let ring = Ring::open(&mut ebpf, buffer, config)?;
        let counters = take_map(&mut ebpf, "COUNTERS", Array::try_from)?;
        let rejected = take_map(&mut ebpf, "REJECTED", PerCpuArray::try_from)?;
        let tcp_sockets = finds_gone.then(|| TcpSockets::open(&mut ebpf, config.max_sockets));
        let tcp_sockets = tcp_sockets.transpose()?.map(Arc::new);
        for name in controls {
            let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded);
            program.and_then(control::load_control).map_err(|source| {
                errors::of_program(&source, "a program that the reader runs", config.protocol)
                    .with_source(source)
            })?;
        }
        // The filter must be there before the first event.
        let mut filters = Filters::new(facts.ids.clone(), facts.networks);
        filters.install(&mut ebpf, &config.filter, config.protocol)?;
        let mut hooks = attach::attach(
            &mut ebpf,
            &plan,
            facts.abilities,
            config.protocol,
            &facts.ids,
        )?;
        // The receive hook shows the local address of a datagram.
        if !is_attached(&hooks, ":skb_consume_udp") {
            set_variable(&mut ebpf, "HIDES_LOCAL", u32::MAX)?;
        }
        if is_attached(&hooks, ":sock_send_length") {
            set_variable(&mut ebpf, "SEES_RESULTS", 1)?;
        }
        set_variable(&mut ebpf, "HOLD", held_listeners(&hooks))?;
        // Only now, because the hooks have seen every socket that was created in the meantime.
        let iters = iter::start(&mut ebpf, config, &facts.ids);
        hooks.extend(iters.hooks);
        hooks.push(ring::hook(buffer, facts.ring_buffer_sleeps));
        let cgroup_links = CgroupLinks::of(&ebpf);
        Ok((
            Self {
                ebpf,
                hooks,
                cgroup_links,
                sample_scope: iters.samples,
                counters,
                rejected,
                protocol: config.protocol,
                tcp_sockets,
                filters,
                log,
                recursion_misses: None,
                // The file shows the time namespace of the process's children. It is the process's
                // own, unless the process has changed it for its children.
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

    /// Returns the name of a program that another process has detached.
    pub(crate) fn detached(&self) -> Option<&str> {
        self.cgroup_links.detached()
    }

    pub(crate) fn sample_scope(&self) -> SampleScope {
        self.sample_scope
    }

    /// See [`Shared::open_socket_iter`](crate::tasks::Shared::open_socket_iter).
    pub(crate) fn open_socket_iter(&mut self) -> io::Result<File> {
        iter::open(&mut self.ebpf).map_err(io::Error::other)
    }

    /// Returns the TCP sockets that the programs remember, if the tracer looks for those that are
    /// gone.
    pub(crate) fn tcp_sockets(&self) -> Option<Arc<TcpSockets>> {
        self.tcp_sockets.clone()
    }

    /// Reports the TCP socket at this address if it is gone for the second search in a row. With
    /// address 0, reports a socket whose address has another one, and returns whether there was
    /// one.
    pub(crate) fn check_gone(&self, address: u64, search: u32) -> io::Result<bool> {
        control::check_gone(&self.ebpf, address, search)
    }

    /// Arms the wake-up by the next record. Returns how many records found the ring full so far,
    /// modulo 2³².
    pub(crate) fn arm(&self) -> io::Result<u32> {
        control::run(&self.ebpf, ARM_WAKEUP)
    }

    /// Returns how many eighths of the ring are full.
    pub(crate) fn ring_fill(&self) -> Option<u32> {
        control::run(&self.ebpf, RING_FILL).ok()
    }

    /// Returns the counters of the programs.
    pub(crate) fn counters(&self) -> Counters {
        // A lookup in an array cannot fail.
        self.counters.get(&0, 0).map_or_else(
            |_| Counters::default(),
            |counts| zerocopy::transmute!(counts),
        )
    }

    /// Returns how many records of each kind the filters have rejected.
    pub(crate) fn rejected(&self) -> [u64; kind::COUNT] {
        std::array::from_fn(|kind| {
            // Without a filter so far, no map need be read.
            let counts = self
                .filters
                .were_used()
                .then(|| self.rejected.get(&(kind as u32), 0));
            // A lookup cannot fail here either.
            counts
                .and_then(Result::ok)
                .map_or(0, |cpus| cpus.iter().sum())
        })
    }

    /// See [`TracerHandle::set_filter`](crate::TracerHandle::set_filter).
    pub(crate) fn set_filter(&mut self, filter: &Filter) -> Result<(), Error> {
        self.filters.install(&mut self.ebpf, filter, self.protocol)
    }

    /// Returns whether a UDP event that user space produced passes the filter.
    pub(crate) fn passes(&self, event: &Event) -> bool {
        self.filters.passes(&self.ebpf, event)
    }

    /// Returns whether the filter lets the end of a UDP socket pass if it lets one of the socket's
    /// flows pass.
    pub(crate) fn passes_end_of_flows(&self, event: &Event) -> bool {
        self.filters.passes_but_ends(&self.ebpf, event)
    }

    /// Returns how often the kernel skipped a program that was already active on the CPU; `None` if
    /// the kernel does not show it.
    pub(crate) fn recursion_misses(&self) -> Option<u64> {
        let loaded = self
            .ebpf
            .programs()
            .filter(|(name, _)| !CONTROL_PROGRAMS.contains(name))
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

    /// Passes the programs' log to the `log` crate.
    pub(crate) fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Removes the programs from the kernel. The maps stay, and with them the records.
    ///
    /// Blocks until the kernel is sure that no CPU runs the programs. The kernel waits up to 0.1 s
    /// for that at each tracepoint, so the programs are removed in parallel.
    pub(crate) fn detach(&mut self) {
        self.recursion_misses = self.recursion_misses();
        let stopping = self.ebpf.map_mut("STOPPING").map(Array::try_from);
        if let Some(Ok(mut stopping)) = stopping {
            // A write to an array cannot fail. If it did, the programs would count some closes as
            // missed.
            let _ = stopping.set(0, 1_u32, 0);
        }
        thread::scope(|scope| {
            for (name, program) in self.ebpf.programs_mut() {
                if program.fd().is_err() || CONTROL_PROGRAMS.contains(&name) {
                    continue;
                }
                // Without a thread, the drop of `ebpf` removes the programs, one after the other.
                let _ = thread::Builder::new().spawn_scoped(scope, || program::unload(program));
            }
        });
    }
}

/// Looks up everything that a start needs in arbitrary bytes. For the fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) fn check_btf(bytes: &[u8]) -> Result<(), Error> {
    let source = Source::from(bytes);
    let btf = source.parse()?;
    let targets = ["task_file", "tcp"].map(ids::Target::iterator);
    let ids = ids::for_aya(&ids::find(&btf, targets.clone()), &targets);
    assert!(
        ids.is_ok(),
        "aya rejects the BTF that this crate builds for it"
    );
    offsets::resolve(&btf).map(|_| ())
}

/// Returns which listeners without a port a hook sees later: one of [`hold`].
fn held_listeners(hooks: &[Hook]) -> u32 {
    let mut listen = hooks.iter().filter(|hook| hook.signal == plan::LISTEN);
    let programs = listen.next().map_or(&[][..], |hook| &hook.programs);
    match programs.first() {
        Some(program) if program.starts_with("kprobe:") => hold::ALL,
        Some(_) => hold::OF_SYSTEM_CALL,
        None => hold::NONE,
    }
}

/// Returns whether a program is attached at a hook point whose name ends like this.
fn is_attached(hooks: &[Hook], point: &str) -> bool {
    let mut programs = hooks.iter().flat_map(|hook| &hook.programs);
    programs.any(|program| program.ends_with(point))
}

impl FlowMap for Kernel {
    fn totals(&self, flow: &FlowKey, cookie: Option<u64>, known: Traffic) -> Option<Totals> {
        control::query_flow(&self.ebpf, flow, cookie, known, false, self.time_offset)
    }

    fn take(&mut self, flow: &FlowKey, cookie: Option<u64>) -> Option<Totals> {
        let known = Traffic::default();
        control::query_flow(&self.ebpf, flow, cookie, known, true, self.time_offset)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Makes a loader without the kernel's BTF, if the process may hide the BTF.
///
/// aya's loader starts by reading all of the BTF. That takes most of the time and memory of a
/// start, and the objects of this crate do not refer to it.
fn loader<'a>() -> EbpfLoader<'a> {
    let without_btf = || {
        if let Err(error) = private_mounts::hide_btf() {
            log::debug!("the kernel's BTF cannot be hidden from the loader: {error}");
        }
        EbpfLoader::new()
    };
    let thread = thread::Builder::new().spawn(without_btf);
    let made = thread.ok().and_then(|thread| thread.join().ok());
    made.unwrap_or_default()
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("hooks", &self.hooks)
            .finish_non_exhaustive()
    }
}
