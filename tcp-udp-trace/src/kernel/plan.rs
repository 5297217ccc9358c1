//! The attach plan: for each signal, the kernel hooks in order of preference.
//!
//! The plan does not depend on the version of the kernel. The tracer tries each choice that is
//! exact on the running kernel, and takes the first one that this kernel accepts. docs/kernels.md
//! shows which choices were taken on the tested kernels.

use super::btf::ids::Target;
use crate::{config::Config, event::Protocol};

/// Something in the kernel that a tracer observes.
pub(super) struct Signal {
    pub(super) name: &'static str,
    /// The tracer does not start without this signal.
    pub(super) required: bool,
    /// Each slot takes its first choice that works. All slots observe the same thing.
    pub(super) slots: &'static [&'static [Choice]],
}

/// Hooks that are used together.
pub(super) struct Choice {
    /// The programs, each with its hook. The first one must attach. The others may be missing.
    pub(super) hooks: &'static [(&'static str, HookPoint)],
    /// The disadvantage compared with the choices before it, or the limit of the best choice.
    pub(super) cost: Option<&'static str>,
    /// The choice is skipped on a kernel that may preempt a program of a tracepoint.
    pub(super) if_not_preempted: bool,
}

/// The facts about the running kernel that the plan depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Abilities {
    pub(super) has_kprobes: bool,
    /// Whether the kernel may preempt a program of a tracepoint.
    pub(super) preempts_tracepoints: bool,
}

/// Returns the name of a system call's function.
pub(super) fn function_of(call: &str) -> String {
    let prefix = if cfg!(target_arch = "aarch64") {
        "__arm64_"
    } else {
        "__x64_"
    };
    format!("{prefix}{call}")
}

/// A point in the kernel where a program can be attached.
#[derive(Debug, Clone, Copy)]
pub(super) enum HookPoint {
    RawTracepoint(&'static str),
    /// Category and name. Needs tracefs.
    Tracepoint(&'static str, &'static str),
    BtfTracepoint(&'static str),
    Kprobe(&'static str),
    Fentry(&'static str),
    /// The return of a system call's function. A kretprobe would miss the returns of further calls
    /// while ten calls wait in the function.
    Fexit(&'static str),
    /// The root of cgroup v2. The name is that of the program's section.
    Cgroup(&'static str),
}

/// Returns the signals of a tracer.
pub(super) fn signals(config: &Config) -> Vec<&'static Signal> {
    let always = match config.protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    };
    let on_request = [
        (config.retransmits, &RETRANSMIT),
        (config.resets, &RESET),
        (config.listen_overflows, &LISTEN_OVERFLOW),
    ];
    let on_request = on_request.into_iter().filter(|(enabled, _)| *enabled);
    let signals = always.iter().chain(on_request.map(|(_, s)| s));
    let ends = |signal: &&Signal| !config.summaries_only || OF_ENDS.contains(&signal.name);
    signals.filter(ends).collect()
}

impl Signal {
    /// Returns the programs, each with its hook, that will probably be attached.
    pub(super) fn likely(
        &self,
        abilities: Abilities,
    ) -> impl Iterator<Item = (&'static str, HookPoint)> {
        let is_likely = move |choice: &&Choice| match choice.hooks[0].1 {
            // On x86-64, a kernel has both or none.
            Kprobe(_) | Fexit(_) => abilities.has_kprobes,
            _ if choice.if_not_preempted => !abilities.preempts_tracepoints,
            // It is the last choice.
            Fentry(_) => false,
            _ => true,
        };
        let choices = self.slots.iter();
        let choices = choices.filter_map(move |slot| slot.iter().find(is_likely));
        choices.flat_map(|choice| choice.hooks).copied()
    }

    /// Returns the types of the kernel's BTF that the programs of all choices need to load.
    pub(super) fn targets(&self) -> impl Iterator<Item = Target> {
        let choices = self.slots.iter().copied().flatten();
        let hooks = choices.flat_map(|choice| choice.hooks);
        hooks.filter_map(|(_, point)| point.target())
    }
}

impl HookPoint {
    /// Returns the type of the kernel's BTF that a program for it needs to load.
    pub(super) fn target(self) -> Option<Target> {
        match self {
            BtfTracepoint(name) => Some(Target::tracepoint(name)),
            Fentry(function) => Some(Target::function(function)),
            Fexit(call) => Some(Target::function(&function_of(call))),
            _ => None,
        }
    }
}

impl Choice {
    pub(super) fn needs_tracefs(&self) -> bool {
        self.hooks
            .iter()
            .any(|(_, point)| matches!(point, Tracepoint(..)))
    }
}

/// The signals that the ends of connections come from.
const OF_ENDS: &[&str] = &["state", "end", "accept"];

/// The signal whose hooks see the port that the kernel chooses for a listener.
pub(super) const LISTEN: &str = "listen";

use HookPoint::{BtfTracepoint, Cgroup, Fentry, Fexit, Kprobe, RawTracepoint, Tracepoint};

/// The signals of every `TcpTracer`.
///
/// Two programs observe each state change, because the kernel skips a program that is already
/// active on the CPU. On 7.2, one program missed up to half of all transitions, and both together
/// at most 0.04 %.
///
/// Where the kernel cannot preempt a program of a tracepoint, only a softirq interrupts it, and
/// softirqs do not nest. So at most one of two programs is active, of whichever types they are.
/// Elsewhere, the second program is classic: the kernel guards those in another way, and does not
/// preempt them.
#[rustfmt::skip]
const TCP: &[Signal] = &[
    Signal { name: "state", required: true, slots: &[
        &[best(&[("tcp_state_btf", BtfTracepoint("inet_sock_set_state"))]),
          worse(&[("tcp_state_raw", RawTracepoint("inet_sock_set_state"))], NO_BTF_STATE)],
        &[best_if_not_preempted(&[("tcp_state_raw", RawTracepoint("inet_sock_set_state"))]),
          best(&[("tcp_state_tp", Tracepoint("sock", "inet_sock_set_state"))]),
          worse(&[("tcp_state_raw", RawTracepoint("inet_sock_set_state"))], NO_TRACEFS_STATE)],
    ] },
    Signal { name: "end", required: false, slots: &[
        &[best(&[("tcp_end_raw", RawTracepoint("tcp_destroy_sock"))])],
        &[best_if_not_preempted(&[("tcp_end_btf", BtfTracepoint("tcp_destroy_sock"))]),
          best(&[("tcp_end_tp", Tracepoint("tcp", "tcp_destroy_sock"))])],
    ] },
    Signal { name: "accept", required: false, slots: &[&[
        best(&[("accept_kprobe", Kprobe("security_sock_graft"))]),
        worse(&[("accept_exit", Tracepoint("syscalls", "sys_exit_accept4")),
                ("accept_exit", Tracepoint("syscalls", "sys_exit_accept")),
                ("accept_uring", Tracepoint("io_uring", "io_uring_complete")),
                ("accept_uring_overflow", Tracepoint("io_uring", "io_uring_cqe_overflow"))], NO_KPROBE_ACCEPT),
        worse(&[("accept_fentry", Fentry("security_sock_graft"))], FENTRY),
        worse(&[("accept_sys_exit", RawTracepoint("sys_exit"))], SYS_EXIT),
    ]] },
    // Without tracefs, the only hook is one in every system call. That costs too much for a signal
    // of failures.
    Signal { name: "connect_failed", required: false, slots: &[&[
        worse(&[("tcp_connect_fexit", Fexit("sys_connect"))], ONLY_CONNECT),
        worse(&[("tcp_connect_exit", Tracepoint("syscalls", "sys_exit_connect"))], NO_FEXIT_CONNECT),
    ]] },
    // The kernel chooses a port after the state change.
    Signal { name: LISTEN, required: false, slots: &[&[
        best(&[("tcp_hash", Kprobe("inet_hash")), ("tcp_hash", Kprobe("inet6_hash"))]),
        worse(&[("tcp_listen_exit", Tracepoint("syscalls", "sys_exit_listen"))], NO_KPROBE_LISTEN),
    ]] },
];

/// The signals that a `TcpTracer` has on request.
#[rustfmt::skip]
const RETRANSMIT: Signal = Signal { name: "retransmit", required: false, slots: &[&[
    best(&[("tcp_retransmit_err", RawTracepoint("tcp_retransmit_skb")),
           ("tcp_retransmit_synack", RawTracepoint("tcp_retransmit_synack"))]),
    best(&[("tcp_retransmit", RawTracepoint("tcp_retransmit_skb")),
           ("tcp_retransmit_synack", RawTracepoint("tcp_retransmit_synack"))]),
]] };
#[rustfmt::skip]
const RESET: Signal = Signal { name: "reset", required: false, slots: &[&[
    best(&[("tcp_reset_sent_reason", RawTracepoint("tcp_send_reset")),
           ("tcp_reset_received", RawTracepoint("tcp_receive_reset"))]),
    best(&[("tcp_reset_sent", RawTracepoint("tcp_send_reset")),
           ("tcp_reset_received", RawTracepoint("tcp_receive_reset"))]),
]] };
// Only kprobes: the kernel frees a SYN that it drops like one that it takes, and no tracepoint
// runs.
#[rustfmt::skip]
const LISTEN_OVERFLOW: Signal = Signal { name: "listen_overflow", required: false, slots: &[&[
    worse(&[("tcp_syn", Kprobe("tcp_conn_request")), ("tcp_child4", Kprobe("tcp_v4_syn_recv_sock")),
            ("tcp_child6", Kprobe("tcp_v6_syn_recv_sock"))], KPROBE_IN_SOFTIRQ),
]] };

/// The signals of a `UdpTracer`.
///
/// On every kernel, hooks at the cgroup observe the creation, the sends and the release of a
/// socket. The kernel never skips these hooks, and they run in the caller's own context where the
/// programs depend on it. The hook of sends sees each datagram once, after all checks that could
/// refuse it.
#[rustfmt::skip]
const UDP: &[Signal] = &[
    Signal { name: "life", required: true, slots: &[&[
        best(&[("udp_create", Cgroup("sock_create")), ("udp_release", Cgroup("sock_release"))]),
    ]] },
    Signal { name: "send", required: true, slots: &[&[
        best(&[("udp_egress", Cgroup("egress"))]),
    ]] },
    Signal { name: "drop", required: false, slots: &[&[
        best(&[("udp_send_length", RawTracepoint("sock_send_length")), ("udp_drop", RawTracepoint("kfree_skb"))]),
        worse(&[("udp_drop", RawTracepoint("kfree_skb"))], NO_RESULT),
        worse(&[("udp_drop_no_reason", RawTracepoint("kfree_skb"))], NO_RESULT),
    ]] },
    Signal { name: "receive", required: false, slots: &[&[
        best(&[("udp_consume_kprobe", Kprobe("skb_consume_udp"))]),
        worse_if_not_preempted(&[("udp_recv_length_raw", RawTracepoint("sock_recv_length")),
                ("udp_recvmsg4", Cgroup("recvmsg4")), ("udp_recvmsg6", Cgroup("recvmsg6"))], NO_KPROBE_RECEIVE),
        worse(&[("udp_recv_length_tp", Tracepoint("sock", "sock_recv_length")),
                ("udp_recvmsg4", Cgroup("recvmsg4")), ("udp_recvmsg6", Cgroup("recvmsg6"))], NO_KPROBE_RECEIVE),
        worse(&[("udp_consume_fentry", Fentry("skb_consume_udp"))], FENTRY),
        worse(&[("udp_recv_length_raw", RawTracepoint("sock_recv_length")),
                ("udp_recvmsg4", Cgroup("recvmsg4")), ("udp_recvmsg6", Cgroup("recvmsg6"))], NO_TRACEFS_RECEIVE),
    ]] },
    Signal { name: "connect", required: false, slots: &[&[
        worse(&[("udp_connect_fexit", Fexit("sys_connect")),
                ("udp_connect4", Cgroup("connect4")), ("udp_connect6", Cgroup("connect6")),
                ("udp_connect_uring", Tracepoint("io_uring", "io_uring_complete"))], ONLY_NATIVE),
        worse(&[("udp_connect_exit", Tracepoint("syscalls", "sys_exit_connect")),
                ("udp_connect4", Cgroup("connect4")), ("udp_connect6", Cgroup("connect6")),
                ("udp_connect_uring", Tracepoint("io_uring", "io_uring_complete"))], NO_FEXIT_NATIVE),
        worse(&[("udp_connect_sys_exit", RawTracepoint("sys_exit")),
                ("udp_connect4", Cgroup("connect4")), ("udp_connect6", Cgroup("connect6"))], SYS_EXIT),
    ]] },
];

const NO_BTF_STATE: &str =
    "the kernel has no BTF of its own: a state change takes about 150 ns longer";
const NO_TRACEFS_STATE: &str =
    "without tracefs, a few per cent of transitions are missed under load";
const NO_KPROBE_ACCEPT: &str = "no kprobes: accepts inside the kernel, in 32-bit programs, and by \
     io_uring without completion or before Linux 5.18 are not seen";
const NO_KPROBE_RECEIVE: &str = "no kprobes: recv and read on an unconnected socket do not report \
     the peer, and a UDP_GRO receive counts as one datagram (marked approximate)";
const NO_TRACEFS_RECEIVE: &str = "no kprobes and no tracefs: the same, and some events are missed \
     under load";
const NO_RESULT: &str = "the kernel does not show the result of a send: one that fails because a \
     network device or its queue drops the datagram is counted (marked approximate), before Linux \
     5.18 also one that a cgroup program refuses";
const FENTRY: &str = "some events are missed under load on preemptible kernels";
const KPROBE_IN_SOFTIRQ: &str = "an event is missed if the segment interrupts another program of a \
     kprobe or a classic tracepoint on the same CPU";
const ONLY_CONNECT: &str = "failed connects by io_uring and in 32-bit programs are not seen, and \
     some others are missed under load on preemptible kernels";
const NO_FEXIT_CONNECT: &str = "no fexit: each system call of the machine takes a little longer, \
     failed connects by io_uring and in 32-bit programs are not seen, and some others are missed \
     under load on preemptible kernels";
const ONLY_NATIVE: &str = "connects in 32-bit programs are reported late, failed connects by \
     io_uring are not seen, and some others are missed under load on preemptible kernels";
const NO_FEXIT_NATIVE: &str = "no fexit: each system call of the machine takes a little longer, \
     connects in 32-bit programs are reported late, and failed connects by io_uring are not seen";
const NO_KPROBE_LISTEN: &str = "no kprobes: the first event of a listener without `bind` has no \
     port if io_uring or a 32-bit program made the listener";
const SYS_EXIT: &str = "no tracefs: each system call of the machine takes about 20 ns longer, and io_uring is not seen";

const fn best(hooks: &'static [(&'static str, HookPoint)]) -> Choice {
    Choice {
        hooks,
        cost: None,
        if_not_preempted: false,
    }
}

const fn best_if_not_preempted(hooks: &'static [(&'static str, HookPoint)]) -> Choice {
    Choice {
        if_not_preempted: true,
        ..best(hooks)
    }
}

const fn worse_if_not_preempted(
    hooks: &'static [(&'static str, HookPoint)],
    cost: &'static str,
) -> Choice {
    Choice {
        if_not_preempted: true,
        ..worse(hooks, cost)
    }
}

const fn worse(hooks: &'static [(&'static str, HookPoint)], cost: &'static str) -> Choice {
    Choice {
        cost: Some(cost),
        ..best(hooks)
    }
}

impl std::fmt::Display for HookPoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RawTracepoint(name) => write!(f, "raw_tracepoint:{name}"),
            Tracepoint(category, name) => write!(f, "tracepoint:{category}/{name}"),
            BtfTracepoint(name) => write!(f, "tp_btf:{name}"),
            Kprobe(function) => write!(f, "kprobe:{function}"),
            Fentry(function) => write!(f, "fentry:{function}"),
            Fexit(call) => write!(f, "fexit:{call}"),
            Cgroup(name) => write!(f, "cgroup:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, env, fs};

    use super::*;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kernels.md");
    /// The beginning of each row of the table.
    const ROW: &str = "| `";
    const RULE: &str = "|---|---|---|";

    /// Returns the cells that come from the plan: signal, hooks, cost.
    fn rows() -> Vec<[String; 3]> {
        let signals = TCP
            .iter()
            .chain([&RETRANSMIT, &RESET, &LISTEN_OVERFLOW])
            .chain(UDP);
        let mut rows = Vec::new();
        for signal in signals {
            for (index, choices) in signal.slots.iter().enumerate() {
                let nth = match (signal.slots.len(), index) {
                    (1, _) => "",
                    (_, 0) => ", first program",
                    (_, _) => ", second program",
                };
                for Choice { hooks, cost, .. } in *choices {
                    let mut points: Vec<_> = hooks
                        .iter()
                        .map(|(_, point)| format!("`{point}`"))
                        .collect();
                    points.dedup();
                    rows.push([
                        format!("`{}`{nth}", signal.name),
                        points.join(", "),
                        cost.unwrap_or_default().to_owned(),
                    ]);
                }
            }
        }
        // Two programs may share a hook.
        rows.dedup();
        rows
    }

    /// Returns the page with the plan's rows. The marks of the kernels, which the integration tests
    /// check, stay with their hooks.
    fn with_plan(page: &str) -> String {
        let (above, below) = page.split_once(RULE).expect("the table of the plan");
        let (columns, below) = below.split_once('\n').expect("rows");
        let kernels = columns.matches("---").count();
        let is_row = |line: &&str| line.starts_with(ROW);
        let marks: HashMap<_, _> = below
            .lines()
            .take_while(is_row)
            .filter_map(|row| {
                let cells: Vec<_> = row.split('|').map(str::trim).collect();
                Some((
                    [1, 2, 3].map(|cell| cells.get(cell).map(ToString::to_string)),
                    cells.get(4..cells.len() - 1)?.join(" | "),
                ))
            })
            .collect();
        let mut table = String::new();
        for [signal, hooks, cost] in rows() {
            let none = vec![""; kernels].join(" | ");
            let key = [&signal, &hooks, &cost].map(|cell| Some(cell.clone()));
            let marks = marks.get(&key).unwrap_or(&none);
            table += &format!("| {signal} | {hooks} | {cost} | {marks} |\n");
        }
        let rest: Vec<_> = below.lines().skip_while(is_row).collect();
        format!("{above}{RULE}{columns}\n{table}{}\n", rest.join("\n"))
    }

    #[test]
    fn the_page_shows_the_plan() {
        let page = fs::read_to_string(PAGE).expect("docs/kernels.md");
        let expected = with_plan(&page);
        if env::var_os("BLESS").is_some() {
            fs::write(PAGE, &expected).expect("docs/kernels.md can be written");
        }
        assert!(
            page == expected,
            "docs/kernels.md does not show the plan: run this test with BLESS=1, and mark the \
             choices that each kernel takes"
        );
    }
}
