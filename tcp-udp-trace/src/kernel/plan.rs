//! The attach plan: for each signal, the kernel hooks in the order of our preference.
//!
//! What works on which kernel was measured (docs/kernels.md), but nothing here asks for a version or a feature:
//! each choice is tried, and the first that the running kernel accepts is taken.

/// Something that a tracer needs to hear about.
pub(super) struct Signal {
    pub(super) name: &'static str,
    /// Without this signal there is nothing to trace.
    pub(super) required: bool,
    /// Each slot is filled with its first choice that works; the slots hear the same thing.
    pub(super) slots: &'static [&'static [Choice]],
}

/// Hooks that serve together.
pub(super) struct Choice {
    /// The programs, each with its hook. The first must attach; the others may be missing.
    pub(super) hooks: &'static [(&'static str, HookPoint)],
    /// What is worse about it than about the choices before it.
    pub(super) cost: Option<&'static str>,
}

/// Where a program can be attached.
#[derive(Debug, Clone, Copy)]
pub(super) enum HookPoint {
    RawTracepoint(&'static str),
    /// Category and name. Needs tracefs.
    Tracepoint(&'static str, &'static str),
    BtfTracepoint(&'static str),
    Kprobe(&'static str),
    Fentry(&'static str),
    /// At the root of cgroup v2, named as in the program's section.
    Cgroup(&'static str),
}

use HookPoint::{BtfTracepoint, Cgroup, Fentry, Kprobe, RawTracepoint, Tracepoint};

/// What `TcpTracer` attaches.
pub(super) const TCP: &[Signal] = &[
    // Two programs, because the kernel skips one that is already active on the CPU: up to half of all transitions
    // with one raw tracepoint on 7.2, none with both.
    Signal {
        name: "state",
        required: true,
        slots: &[
            &[Choice {
                hooks: &[("tcp_state_raw", RawTracepoint("inet_sock_set_state"))],
                cost: None,
            }],
            &[
                Choice {
                    hooks: &[("tcp_state_tp", Tracepoint("sock", "inet_sock_set_state"))],
                    cost: None,
                },
                Choice {
                    hooks: &[("tcp_state_btf", BtfTracepoint("inet_sock_set_state"))],
                    cost: Some(
                        "without tracefs a few per cent of transitions are missed under load on preemptible kernels",
                    ),
                },
            ],
        ],
    },
    Signal {
        name: "end",
        required: false,
        slots: &[
            &[Choice {
                hooks: &[("tcp_end_raw", RawTracepoint("tcp_destroy_sock"))],
                cost: None,
            }],
            &[Choice {
                hooks: &[("tcp_end_tp", Tracepoint("tcp", "tcp_destroy_sock"))],
                cost: None,
            }],
        ],
    },
    Signal {
        name: "accept",
        required: false,
        slots: &[&[
            Choice {
                hooks: &[("accept_kprobe", Kprobe("security_sock_graft"))],
                cost: None,
            },
            Choice {
                hooks: &[
                    ("accept_exit", Tracepoint("syscalls", "sys_exit_accept4")),
                    ("accept_exit", Tracepoint("syscalls", "sys_exit_accept")),
                    ("accept_uring", Tracepoint("io_uring", "io_uring_complete")),
                ],
                cost: Some(
                    "no kprobes: accepts inside the kernel and of 32-bit programs are not seen",
                ),
            },
            Choice {
                hooks: &[("accept_fentry", Fentry("security_sock_graft"))],
                cost: Some("a few accepts are missed under load on preemptible kernels"),
            },
            Choice {
                hooks: &[("accept_sys_exit", RawTracepoint("sys_exit"))],
                cost: Some(
                    "neither kprobes nor tracefs: each system call of the machine costs about 20 ns more, io_uring accepts are not seen",
                ),
            },
        ]],
    },
];

/// What `UdpTracer` attaches.
///
/// Sockets live and send at the cgroup on every kernel: those hooks are never skipped, run in the caller's own context where it
/// matters, and see each datagram once, after everything that could still refuse it.
pub(super) const UDP: &[Signal] = &[
    Signal {
        name: "life",
        required: true,
        slots: &[&[Choice {
            hooks: &[
                ("udp_create", Cgroup("sock_create")),
                ("udp_release", Cgroup("sock_release")),
            ],
            cost: None,
        }]],
    },
    Signal {
        name: "send",
        required: true,
        slots: &[&[Choice {
            hooks: &[("udp_egress", Cgroup("egress"))],
            cost: None,
        }]],
    },
    Signal {
        name: "receive",
        required: false,
        slots: &[&[
            Choice {
                hooks: &[("udp_consume_kprobe", Kprobe("skb_consume_udp"))],
                cost: None,
            },
            Choice {
                hooks: &[
                    ("udp_recv_length_tp", Tracepoint("sock", "sock_recv_length")),
                    ("udp_recvmsg4", Cgroup("recvmsg4")),
                    ("udp_recvmsg6", Cgroup("recvmsg6")),
                ],
                cost: Some(NO_KPROBE_RECEIVE),
            },
            Choice {
                hooks: &[("udp_consume_fentry", Fentry("skb_consume_udp"))],
                cost: Some("a few receives are missed under load on preemptible kernels"),
            },
            Choice {
                hooks: &[
                    ("udp_recv_length_raw", RawTracepoint("sock_recv_length")),
                    ("udp_recvmsg4", Cgroup("recvmsg4")),
                    ("udp_recvmsg6", Cgroup("recvmsg6")),
                ],
                cost: Some(NO_KPROBE_RECEIVE),
            },
        ]],
    },
    Signal {
        name: "connect",
        required: false,
        slots: &[&[
            Choice {
                hooks: &[
                    (
                        "udp_connect_exit",
                        Tracepoint("syscalls", "sys_exit_connect"),
                    ),
                    ("udp_connect4", Cgroup("connect4")),
                    ("udp_connect6", Cgroup("connect6")),
                    (
                        "udp_connect_uring",
                        Tracepoint("io_uring", "io_uring_complete"),
                    ),
                ],
                cost: None,
            },
            Choice {
                hooks: &[
                    ("udp_connect_sys_exit", RawTracepoint("sys_exit")),
                    ("udp_connect4", Cgroup("connect4")),
                    ("udp_connect6", Cgroup("connect6")),
                ],
                cost: Some(
                    "no tracefs: each system call of the machine costs about 20 ns more, connects by io_uring are not seen",
                ),
            },
        ]],
    },
];

const NO_KPROBE_RECEIVE: &str = "no kprobes: recv and read do not tell the peer of an unconnected socket, \
     and a UDP_GRO receive counts as one datagram (marked approximate)";

impl std::fmt::Display for HookPoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RawTracepoint(name) => write!(f, "raw_tracepoint:{name}"),
            Tracepoint(category, name) => write!(f, "tracepoint:{category}/{name}"),
            BtfTracepoint(name) => write!(f, "tp_btf:{name}"),
            Kprobe(function) => write!(f, "kprobe:{function}"),
            Fentry(function) => write!(f, "fentry:{function}"),
            Cgroup(name) => write!(f, "cgroup:{name}"),
        }
    }
}
