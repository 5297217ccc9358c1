//! The fields of kernel structures that the programs read. Their offsets differ from kernel to
//! kernel, so user space finds them in the running kernel's BTF and passes them as a read-only
//! global.

/// The offset of a field that this kernel does not have.
pub const ABSENT: u32 = u32::MAX;

/// The offset of every [`Field`], in bytes, or [`ABSENT`].
pub type Offsets = [u32; FIELDS.len()];

/// A field to find.
#[derive(Clone, Copy, Debug)]
pub struct WantedField {
    /// The structure, then the members down to the field. ` | ` separates alternative names of
    /// different kernels.
    pub path: &'static str,
    /// Its size in bytes, of which the programs may read fewer. 0 for an array without a fixed
    /// length. A field of another size is not the expected one.
    pub size: u32,
}

/// Returns whether a path begins in `struct sock`.
const fn is_of_sock(path: &str) -> bool {
    matches!(path.as_bytes(), [b's', b'o', b'c', b'k', b'.', ..])
}

macro_rules! fields {
    ($($(#[$cfg:meta])? $name:ident: $size:literal = $path:literal,)+) => {
        /// A field of a kernel structure: an index into [`FIELDS`] and [`Offsets`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Field {
            $($(#[$cfg])? #[doc = concat!("`", $path, "`")] $name,)+
        }

        impl Field {
            /// Returns whether the field is in `struct sock`.
            #[inline(always)]
            pub const fn is_of_sock(self) -> bool {
                match self {
                    $($(#[$cfg])? Self::$name => is_of_sock($path),)+
                }
            }
        }

        /// Every field, in the order of [`Field`].
        pub const FIELDS: &[WantedField] = &[$($(#[$cfg])? WantedField { path: $path, size: $size },)+];
    };
}

fields! {
    Family: 2 = "sock.__sk_common.skc_family",
    State: 1 = "sock.__sk_common.skc_state",
    RemoteAddr4: 4 = "sock.__sk_common.skc_daddr",
    LocalAddr4: 4 = "sock.__sk_common.skc_rcv_saddr",
    RemoteAddr6: 16 = "sock.__sk_common.skc_v6_daddr",
    LocalAddr6: 16 = "sock.__sk_common.skc_v6_rcv_saddr",
    RemotePort: 2 = "sock.__sk_common.skc_dport",
    LocalPort: 2 = "inet_sock.inet_sport",
    BoundPort: 2 = "sock.__sk_common.skc_num",
    Device: 4 = "sock.__sk_common.skc_bound_dev_if",
    Net: 8 = "sock.__sk_common.skc_net.net",
    Cookie: 8 = "sock.__sk_common.skc_cookie",
    Protocol: 2 = "sock.sk_protocol",
    Error: 4 = "sock.sk_err",
    Flags: 8 = "sock.__sk_common.skc_flags",
    References: 4 = "sock.__sk_common.skc_refcnt",
    Locked: 4 = "sock.sk_lock.owned",
    SkUid: 4 = "sock.sk_uid",
    Cgroup: 8 = "sock.sk_cgrp_data.cgroup | sock.sk_cgrp_data.val",
    SkSocket: 8 = "sock.sk_socket",
    NetInode: 4 = "net.ns.inum",
    NetCookie: 8 = "net.net_cookie",
    NetOps: 8 = "net.ns.ops",
    NetNext: 8 = "net.list.next",
    CgroupNode: 8 = "cgroup.kn",
    CgroupLevel: 4 = "cgroup.level",
    Ancestors: 0 = "cgroup.ancestors | cgroup.ancestor_ids",
    CgroupNodeId: 8 = "kernfs_node.id",
    KernfsPrivate: 8 = "kernfs_node.priv",
    BytesReceived: 8 = "tcp_sock.bytes_received",
    BytesSent: 8 = "tcp_sock.bytes_sent",
    BytesRetrans: 8 = "tcp_sock.bytes_retrans",
    BytesAcked: 8 = "tcp_sock.bytes_acked",
    SmoothedRtt: 4 = "tcp_sock.srtt_us",
    RttDeviation: 4 = "tcp_sock.mdev_us",
    MinRtt: 4 = "tcp_sock.rtt_min.s.v",
    TotalRetrans: 4 = "tcp_sock.total_retrans",
    Lost: 4 = "tcp_sock.lost",
    OutOfOrder: 4 = "tcp_sock.rcv_ooopack",
    CaState: 1 = "inet_connection_sock.icsk_ca_state",
    SegsIn: 4 = "tcp_sock.segs_in",
    SegsOut: 4 = "tcp_sock.segs_out",
    SndNxt: 4 = "tcp_sock.snd_nxt",
    SndUna: 4 = "tcp_sock.snd_una",
    WriteSeq: 4 = "tcp_sock.write_seq",
    Repair: 1 = "tcp_sock.repair",
    SentQueue: 16 = "tcp_sock.tsorted_sent_queue",
    UlpData: 8 = "inet_connection_sock.icsk_ulp_data",
    SubflowSock: 8 = "mptcp_subflow_context.tcp_sock",
    SubflowOf: 8 = "mptcp_subflow_context.conn",
    MptcpFirst: 8 = "mptcp_sock.first",
    TaskFlags: 4 = "task_struct.flags",
    GroupLeader: 8 = "task_struct.group_leader",
    Comm: 16 = "task_struct.comm",
    Tgid: 4 = "task_struct.tgid",
    Tid: 4 = "task_struct.pid",
    TaskCgroups: 8 = "task_struct.cgroups",
    CssSetCgroup: 8 = "css_set.dfl_cgrp",
    RealParent: 8 = "task_struct.real_parent",
    Started: 8 = "task_struct.start_boottime",
    ThreadPid: 8 = "task_struct.thread_pid",
    Namespaces: 8 = "task_struct.nsproxy",
    NamespacesNet: 8 = "nsproxy.net_ns",
    PidLevel: 4 = "pid.level",
    PidNumbers: 4 = "pid.numbers.nr",
    Cred: 8 = "task_struct.cred",
    CredUid: 4 = "cred.uid",
    Files: 8 = "task_struct.files",
    FdTable: 8 = "files_struct.fdt",
    FdArray: 8 = "fdtable.fd",
    FdCount: 4 = "fdtable.max_fds",
    FilePrivate: 8 = "file.private_data",
    SocketState: 4 = "socket.state",
    SocketFile: 8 = "socket.file",
    SocketSock: 8 = "socket.sk",
    TaskStack: 8 = "task_struct.stack",
    #[cfg(not(target_arch = "aarch64"))]
    SyscallNumber: 8 = "pt_regs.orig_ax",
    #[cfg(target_arch = "aarch64")]
    SyscallNumber: 4 = "pt_regs.syscallno",
    #[cfg(not(target_arch = "aarch64"))]
    SyscallFirst: 8 = "pt_regs.di",
    #[cfg(target_arch = "aarch64")]
    SyscallFirst: 8 = "pt_regs.orig_x0",
    #[cfg(not(target_arch = "aarch64"))]
    SyscallSecond: 8 = "pt_regs.si",
    #[cfg(target_arch = "aarch64")]
    SyscallSecond: 248 = "pt_regs.regs",
    #[cfg(not(target_arch = "aarch64"))]
    SyscallThird: 8 = "pt_regs.dx",
    #[cfg(target_arch = "aarch64")]
    SyscallThird: 248 = "pt_regs.regs",
    #[cfg(not(target_arch = "aarch64"))]
    SyscallFifth: 8 = "pt_regs.r8",
    #[cfg(target_arch = "aarch64")]
    SyscallFifth: 248 = "pt_regs.regs",
    SockType: 2 = "sock.sk_type",
    Shutdown: 1 = "sock.sk_shutdown",
    AcceptQueue: 4 = "sock.sk_ack_backlog",
    AcceptQueueLimit: 4 = "sock.sk_max_ack_backlog",
    Drops: 4 = "sock.sk_drops",
    DropCounters: 8 = "sock.sk_drop_counters",
    Drops0: 4 = "numa_drop_counters.drops0",
    Drops1: 4 = "numa_drop_counters.drops1",
    UdpFlags: 8 = "udp_sock.udp_flags",
    ReceiveQueued: 4 = "sock.sk_receive_queue.qlen",
    ReaderQueued: 4 = "udp_sock.reader_queue.qlen",
    SkbHead: 8 = "sk_buff.head",
    SkbEnd: 4 = "sk_buff.end",
    SkbLen: 4 = "sk_buff.len",
    SkbControl: 48 = "sk_buff.cb",
    Segments: 2 = "tcp_skb_cb.tcp_gso_segs",
    SkbNext: 8 = "sk_buff.next",
    SkbProtocol: 2 = "sk_buff.protocol",
    SkbMacHeader: 2 = "sk_buff.mac_header",
    SkbNetworkHeader: 2 = "sk_buff.network_header",
    SkbTransportHeader: 2 = "sk_buff.transport_header",
    SkbSegments: 2 = "skb_shared_info.gso_segs",
    SkbSock: 8 = "sk_buff.sk",
    SkbDevice: 8 = "sk_buff.dev",
    DeviceIndex: 4 = "net_device.ifindex",
    SkbInterface: 4 = "sk_buff.skb_iif",
    SkbConntrack: 8 = "sk_buff._nfct",
    ConntrackTuples: 112 = "nf_conn.tuplehash",
    ConntrackStatus: 8 = "nf_conn.status",
    BpfContext: 8 = "task_struct.bpf_ctx",
    CgroupResult: 4 = "bpf_cg_run_ctx.retval",
    SockAddrUser: 8 = "bpf_sock_addr_kern.uaddr",
    IoOpcode: 1 = "io_kiocb.opcode",
    IoFile: 8 = "io_kiocb.file",
    ExecId: 8 = "task_struct.self_exec_id",
    Mm: 8 = "task_struct.mm",
    ExeFile: 8 = "mm_struct.exe_file",
    ArgStart: 8 = "mm_struct.arg_start",
    ArgEnd: 8 = "mm_struct.arg_end",
    FileMount: 8 = "file.f_path.mnt",
    FileDentry: 8 = "file.f_path.dentry",
    DentryInode: 8 = "dentry.d_inode",
    InodePrivate: 8 = "inode.i_private",
    DentryParent: 8 = "dentry.d_parent",
    DentryName: 8 = "dentry.d_name.name",
    DentryHashed: 8 = "dentry.d_hash.pprev",
    VfsMountRoot: 8 = "vfsmount.mnt_root",
    MountRoot: 8 = "mount.mnt.mnt_root",
    MountParent: 8 = "mount.mnt_parent",
    MountPoint: 8 = "mount.mnt_mountpoint",
    IoAcceptSlot: 4 = "io_accept.file_slot",
    IoFiles: 8 = "io_ring_ctx.file_table.data.nodes | io_ring_ctx.file_table.files",
    IoFileCount: 4 = "io_ring_ctx.file_table.data.nr | io_ring_ctx.nr_user_files",
    IoNodeFile: 8 = "io_rsrc_node.file_ptr",
}
