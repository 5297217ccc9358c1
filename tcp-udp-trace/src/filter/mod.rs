//! The filter of a tracer.
//!
//! The kernel side applies the filter before it makes a record. [`Compiled`](compile::Compiled) is
//! the form for the programs. User space produces some events itself: the totals of UDP flows, and
//! the ends of their sockets. [`Filter::matches`] applies the same rules to them.

mod cidr;
pub(crate) mod compile;
pub(crate) mod resolve;
mod text;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU64,
    path::PathBuf,
};

use tcp_udp_trace_common::filter as wire;

use self::cidr::Cidr;
use crate::{
    error::{Error, ErrorKind},
    event::{
        Direction, Event, Protocol, Socket, comm::Comm, kind::Kind, process::Process,
        tcp_state::TcpState,
    },
};

/// Selects the events that a tracer reports. A filter without restrictions selects all events.
///
/// The kernel side applies the filter before it writes an event. So a rejected event takes no room
/// in the buffer and causes no wake-up.
/// [`EventCounts::kernel_filtered`](crate::EventCounts::kernel_filtered) counts these events. A
/// filter selects events, but does not change their content: totals are those of the whole socket,
/// from its beginning.
///
/// Values of the same setting are alternatives. Different settings must all match. `pid`,
/// `pid_tree` and `only_self` count as the same setting, and so do `cgroup` and `cgroup_tree`. The
/// settings that begin with `not_` or `exclude_` reject: one value that matches is enough.
///
/// ```
/// # use tcp_udp_trace::Filter;
/// // Ports 80 or 443, and user 1000.
/// let filter = Filter::new().port(80).port(443).uid(1000);
/// assert_eq!(filter, "port=80,443 uid=1000".parse()?);
/// # Ok::<(), tcp_udp_trace::Error>(())
/// ```
///
/// The end of an unconnected UDP socket has no peer, and perhaps no local address. It passes
/// [`port`](Self::port), [`local`](Self::local), [`remote`](Self::remote) and
/// [`family`](Self::family) if one of the socket's flows passes the filter. That needs a flow that
/// the tracer still remembers ([`Stats::flows_evicted`](crate::Stats::flows_evicted)).
///
/// A filter has at most 511 values and 511 networks. An event whose process, address, cgroup or
/// direction is unknown passes no restriction on it, and no setting rejects it for that. A gap
/// ([`Lost`](crate::EventKind::Lost)) always passes. The tracer checks a filter when it is set:
/// [`filter`](crate::TcpTracerBuilder::filter), [`set_filter`](crate::TracerHandle::set_filter).
///
/// # Text
///
/// [`FromStr`](std::str::FromStr) and `Display` use a text form: settings separated by blanks, each
/// `name=value,value`. The names are those of the methods:
///
/// - `kind` and `state` have the names of [`Kind`] and [`TcpState`], `family` is `ipv4` or `ipv6`.
/// - A `direction` is `outbound`, `inbound` or `listener`.
/// - Networks are `address/length` or one address.
/// - A `comm` has blanks, commas and unprintable characters as `\xNN`. Only the first 15 bytes of a
///   longer name count, because the kernel keeps no more.
/// - A `cgroup` or `cgroup_tree` is an id, or an absolute path in the same form as a `comm`.
/// - `one_in` has one value.
/// - `only_self`, `exclude_self` and `exclude_loopback` have no value.
///
/// Names of settings, kinds, states, families and directions may be in upper or lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a filter does nothing until a tracer has it"]
pub struct Filter {
    pids: Vec<u32>,
    pid_trees: Vec<u32>,
    uids: Vec<u32>,
    comms: Vec<Comm>,
    ports: Vec<u16>,
    local: Vec<Cidr>,
    remote: Vec<Cidr>,
    not_local: Vec<Cidr>,
    not_remote: Vec<Cidr>,
    cgroups: Vec<u64>,
    cgroup_paths: Vec<PathBuf>,
    cgroup_trees: Vec<CgroupTree>,
    cgroup_tree_paths: Vec<PathBuf>,
    namespaces: Vec<Namespace>,
    families: Vec<Family>,
    kinds: Vec<Kind>,
    states: Vec<TcpState>,
    directions: Vec<Direction>,
    one_in: Option<u32>,
    only_self: bool,
    exclude_self: bool,
    exclude_loopback: bool,
}

/// A network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Namespace {
    /// The number that the filter gives.
    inode: u32,
    /// Distinguishes the namespace from earlier and later ones with the same inode. 0 until the
    /// filter is [resolved](Filter::resolve), and on kernels without cookies.
    cookie: u64,
}

impl Namespace {
    /// A cookie that no namespace has.
    const NO_COOKIE: u64 = u64::MAX;

    fn is_of(self, socket: &Socket) -> bool {
        let cookie = socket.netns_cookie.map_or(0, NonZeroU64::get);
        (self.inode, self.cookie) == (socket.netns, cookie)
    }
}

impl From<u32> for Namespace {
    fn from(inode: u32) -> Self {
        Self { inode, cookie: 0 }
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inode.fmt(f)
    }
}

/// A cgroup and all cgroups below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CgroupTree {
    /// The id that the filter gives.
    id: u64,
    /// How many cgroups are above it. 0 until the filter is [resolved](Filter::resolve).
    level: u8,
}

impl From<u64> for CgroupTree {
    fn from(id: u64) -> Self {
        Self { id, level: 0 }
    }
}

impl fmt::Display for CgroupTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

/// A family of addresses. An IPv4-mapped IPv6 address counts as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Filter {
    /// Returns a filter that lets every event pass.
    pub fn new() -> Self {
        Self::default()
    }

    /// Selects sockets that this process owns. The number is not 0.
    ///
    /// It is a number of the tracing process's pid namespace, as `/proc` there shows it. Outside of
    /// containers, it is the number in [`Process::pid`]. In a child namespace, the tracer
    /// translates the number when the filter is set, so the process must exist then. Events still
    /// have the initial namespace's number.
    pub fn pid(mut self, pid: u32) -> Self {
        self.pids.push(pid);
        self
    }

    /// Selects sockets that this process or one of its descendants owns. Current descendants are
    /// found by their chain of living parents. All later descendants belong to the tree.
    ///
    /// A socket stays selected after its process has ended. The process must exist when the filter
    /// is set. Its number is as in [`pid`](Self::pid). The trees have room for 4,096 processes at a
    /// time ([`Stats::untracked_processes`](crate::Stats::untracked_processes) counts those
    /// beyond).
    ///
    /// The filter needs two more programs in the kernel, at `sched_process_fork` and
    /// `sched_process_free`.
    pub fn pid_tree(mut self, pid: u32) -> Self {
        self.pid_trees.push(pid);
        self
    }

    /// Selects sockets that the kernel charges to this user: [`Socket::uid`](crate::Socket::uid).
    pub fn uid(mut self, uid: u32) -> Self {
        self.uids.push(uid);
        self
    }

    /// Selects sockets that a process of this name owns. The whole [`Process::comm`] is compared,
    /// as it was when the process became the owner. The name is not empty. [`Comm::from_bytes`]
    /// takes the first 15 bytes of a longer name, as the kernel does.
    pub fn comm(mut self, comm: Comm) -> Self {
        self.comms.push(comm);
        self
    }

    /// Selects sockets with this port, on either side. The port is not 0.
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// Selects sockets whose local address is in this network. `length` is the number of leading
    /// bits that count, 0 to 32 or 128. All other bits must be 0.
    pub fn local(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.local.push(Cidr { address, length });
        self
    }

    /// Selects sockets whose peer's address is in this network, as in [`local`](Self::local). An
    /// unconnected UDP socket has no peer, but each of its flows and datagrams has one.
    pub fn remote(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.remote.push(Cidr { address, length });
        self
    }

    /// Rejects sockets whose local address is in this network, as in [`local`](Self::local). A
    /// socket whose local address is not known yet passes.
    pub fn not_local(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.not_local.push(Cidr { address, length });
        self
    }

    /// Rejects sockets whose peer's address is in this network, as in [`local`](Self::local). A
    /// listener passes, and so does the end of an unconnected UDP socket.
    pub fn not_remote(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.not_remote.push(Cidr { address, length });
        self
    }

    /// Selects sockets that were created in this cgroup, not in a cgroup below it:
    /// [`Socket::cgroup`](crate::Socket::cgroup). The id is not 0.
    pub fn cgroup(mut self, id: u64) -> Self {
        self.cgroups.push(id);
        self
    }

    /// Selects sockets that were created in the cgroup at this path, not in a cgroup below it.
    ///
    /// The path is absolute, and is one of these:
    ///
    /// - the path of the folder, below the mount point of cgroup v2, such as
    ///   `/sys/fs/cgroup/system.slice/nginx.service`;
    /// - the path in the cgroup v2 hierarchy, as the line `0::` of `/proc/PID/cgroup` shows it,
    ///   such as `/system.slice/nginx.service`. It begins at the machine's root cgroup if that is
    ///   mounted here, else at the root of the cgroup namespace.
    ///
    /// The tracer looks up the path once, when the filter is set. A cgroup that is removed and made
    /// again has another id, and the filter must be set again. A path that does not exist is an
    /// error. A path of a cgroup v1 hierarchy is an error, too, because the kernel does not assign
    /// sockets to it.
    pub fn cgroup_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.cgroup_paths.push(path.into());
        self
    }

    /// Selects sockets that were created in this cgroup or in one below it, such as those of a pod,
    /// a slice or a unit. The id is not 0.
    ///
    /// Cgroups that are made later belong to the tree, too, and so do cgroups that have been
    /// removed while they still have sockets. The tracer looks up the cgroup once, when the filter
    /// is set: it must exist then, below a mount point of cgroup v2.
    ///
    /// The trees of a filter begin at up to four different levels of the hierarchy. Counted from
    /// the root, `/system.slice` is at level 1 and `/system.slice/nginx.service` at level 2.
    pub fn cgroup_tree(mut self, id: u64) -> Self {
        self.cgroup_trees.push(id.into());
        self
    }

    /// Selects sockets that were created in the cgroup at this path or in one below it, as in
    /// [`cgroup_tree`](Self::cgroup_tree). The path is one of those of
    /// [`cgroup_path`](Self::cgroup_path).
    pub fn cgroup_tree_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.cgroup_tree_paths.push(path.into());
        self
    }

    /// Selects sockets of the network namespace that has this inode number when the filter is set:
    /// [`Socket::netns`](crate::Socket::netns). The number is not 0.
    ///
    /// After that namespace has ended, the kernel gives the number to another one. That one does
    /// not pass, because the programs also compare the namespace's cookie
    /// ([`Socket::netns_cookie`](crate::Socket::netns_cookie)). If no namespace has the number when
    /// the filter is set, no event passes, and the library logs a warning.
    ///
    /// Before Linux 5.12, namespaces have no cookies. There, the programs compare the number only.
    pub fn netns(mut self, inode: u32) -> Self {
        self.namespaces.push(inode.into());
        self
    }

    /// Selects sockets whose addresses are of this family.
    pub fn family(mut self, family: Family) -> Self {
        self.families.push(family);
        self
    }

    /// Selects events of this kind. Kinds of the other protocol are allowed, because two tracers
    /// may have the same filter.
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kinds.push(kind);
        self
    }

    /// TCP: selects state changes to this state, and other events of sockets in this state.
    /// The socket of a [`ConnectFailed`](crate::EventKind::ConnectFailed) is in `CLOSE`. UDP: no
    /// restriction.
    pub fn state(mut self, state: TcpState) -> Self {
        self.states.push(state);
        self
    }

    /// TCP: selects sockets of this direction: [`Socket::direction`](crate::Socket::direction). A
    /// socket whose direction is unknown does not pass. UDP: no restriction.
    pub fn direction(mut self, direction: Direction) -> Self {
        self.directions.push(direction);
        self
    }

    /// Selects one of so many sockets, by a hash of their [ids](crate::Socket::id): all events of a
    /// socket, or none. The number is not 0. A later call replaces it.
    ///
    /// To estimate the sums of all sockets, multiply those of the selected ones. Another tracer
    /// selects other sockets, because it gives them other ids.
    pub fn one_in(mut self, sockets: u32) -> Self {
        self.one_in = Some(sockets);
        self
    }

    /// Selects sockets that the tracing process itself owns, in any pid namespace.
    pub fn only_self(mut self) -> Self {
        self.only_self = true;
        self
    }

    /// Rejects sockets that the tracing process itself owns.
    pub fn exclude_self(mut self) -> Self {
        self.exclude_self = true;
        self
    }

    /// Rejects sockets with a loopback address (`127.0.0.0/8`, `::1`) on either side. Traffic
    /// between other addresses of this machine passes.
    pub fn exclude_loopback(mut self) -> Self {
        self.exclude_loopback = true;
        self
    }

    /// Returns whether an event that user space produced passes. The programs have let the socket
    /// pass before. The filter must be a [resolved](Self::resolve) one.
    pub(crate) fn matches(&self, event: &Event, members: &impl Members) -> bool {
        self.matches_ends(event) && self.matches_but_ends(event, members)
    }

    /// Returns whether the ports and addresses of an event pass.
    fn matches_ends(&self, event: &Event) -> bool {
        if Kind::of(event).is_none() {
            return true;
        }
        let (local, remote) = (event.socket.local, event.socket.remote);
        let ports = [local.port(), remote.port()];
        let is_in = |networks: &[Cidr], address: SocketAddr| {
            networks
                .iter()
                .any(|network| network.contains(address.ip()))
        };
        let within = |networks: &[Cidr], address| networks.is_empty() || is_in(networks, address);
        one_of(&self.families, &Family::of(local.ip()))
            && (self.ports.is_empty() || ports.iter().any(|port| self.ports.contains(port)))
            && within(&self.local, local)
            && within(&self.remote, remote)
            && !is_in(&self.not_local, local)
            && !is_in(&self.not_remote, remote)
            && (!self.exclude_loopback
                || ![local, remote].iter().any(|a| is_in(&Cidr::LOOPBACK, *a)))
    }

    /// Returns whether all other properties of an event pass. The end of a UDP socket needs only
    /// that if one of its flows [matches](Self::matches).
    pub(crate) fn matches_but_ends(&self, event: &Event, members: &impl Members) -> bool {
        let (process, socket) = (event.process.as_ref(), &event.socket);
        let owner = |matches: &dyn Fn(&Process) -> bool| process.is_some_and(matches);
        let Some(kind) = Kind::of(event) else {
            return true;
        };
        one_of(&self.kinds, &kind)
            && one_of(&self.uids, &socket.uid)
            && self
                .one_in
                .is_none_or(|one_in| wire::is_chosen(socket.id, wire::last_of(one_in)))
            && (socket.protocol == Protocol::Udp
                || self.directions.is_empty()
                || socket
                    .direction
                    .is_some_and(|it| self.directions.contains(&it)))
            && (self.cgroups.is_empty() && self.cgroup_trees.is_empty()
                || self.cgroups.contains(&socket.cgroup)
                || !self.cgroup_trees.is_empty() && members.has_cgroup(socket.cgroup))
            && (self.namespaces.is_empty() || self.namespaces.iter().any(|one| one.is_of(socket)))
            && (self.comms.is_empty() || owner(&|process| self.comms.contains(&process.comm)))
            && (!self.exclude_self || !owner(&|process| members.has_process(process).is_own))
            && (self.pids.is_empty() && self.pid_trees.is_empty()
                || owner(&|process| self.pids.contains(&process.pid))
                || !self.pid_trees.is_empty()
                    && owner(&|process| members.has_process(process).is_in_tree))
    }

    /// Returns whether any sample can pass.
    pub(crate) fn passes_samples(&self) -> bool {
        self.kinds.is_empty() || self.kinds.contains(&Kind::Sample)
    }

    /// Returns whether any event of this network namespace can pass.
    pub(crate) fn passes_netns(&self, inode: u64) -> bool {
        self.namespaces.is_empty()
            || self
                .namespaces
                .iter()
                .any(|allowed| u64::from(allowed.inode) == inode)
    }
}

/// Returns whether a list lets a value pass. An empty list has no restriction.
fn one_of<T: PartialEq>(allowed: &[T], value: &T) -> bool {
    allowed.is_empty() || allowed.contains(value)
}

/// The members of a filter's trees, which only the programs know.
pub(crate) trait Members {
    /// Returns the relation of a process to the filter.
    fn has_process(&self, process: &Process) -> Membership;

    /// Returns whether the cgroup with this id is in one of the trees of cgroups.
    fn has_cgroup(&self, id: u64) -> bool;
}

/// The relation of a process to a filter.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Membership {
    /// The process is a member of a tree.
    pub(crate) is_in_tree: bool,
    /// The process is the tracing process.
    pub(crate) is_own: bool,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFilter, message)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::event::{EventKind, LossStage, Protocol, process::Origin};

    pub(super) fn everything() -> Filter {
        let comm = Comm::from_bytes(b"a b,c\\\n");
        Filter::new()
            .pid(1)
            .pid(2)
            .pid_tree(3)
            .uid(0)
            .comm(comm)
            .port(443)
            .local(Ipv4Addr::LOCALHOST, 32)
            .remote(Ipv4Addr::new(10, 0, 0, 0), 8)
            .remote(Ipv6Addr::UNSPECIFIED, 0)
            .not_local(Ipv4Addr::new(10, 1, 0, 0), 16)
            .not_remote(Ipv6Addr::LOCALHOST, 128)
            .cgroup(7)
            .cgroup_path("/a b,c")
            .cgroup_tree(9)
            .cgroup_tree_path("/d e")
            .netns(8)
            .family(Family::Ipv4)
            .family(Family::Ipv6)
            .kind(Kind::StateChange)
            .state(TcpState::Established)
            .direction(Direction::Outbound)
            .direction(Direction::Listener)
            .one_in(10)
            .only_self()
            .exclude_self()
            .exclude_loopback()
    }

    /// Every process has this relation to the filter, and every cgroup is in a tree or not.
    struct All(Membership, bool);

    impl Members for All {
        fn has_process(&self, _: &Process) -> Membership {
            self.0
        }

        fn has_cgroup(&self, _: u64) -> bool {
            self.1
        }
    }

    const UNRELATED: All = All(
        Membership {
            is_in_tree: false,
            is_own: false,
        },
        false,
    );

    #[test]
    fn user_space_and_the_kernel_agree() {
        let mut event = Event::gap(
            0,
            LossStage::Ring,
            Protocol::Udp,
            SystemTime::UNIX_EPOCH,
            Duration::ZERO,
        );
        event.kind = EventKind::Flow {
            approximate: false,
            age: Duration::ZERO,
            last: false,
        };
        event.socket.local = "127.0.0.1:50".parse().unwrap();
        event.socket.remote = "10.1.2.3:53".parse().unwrap();
        event.socket.uid = 1000;
        let matches = |event: &Event, text: &str, members: &All| {
            let filter = text.parse::<Filter>().unwrap();
            filter.matches(event, members)
        };
        let unrelated = &UNRELATED;
        for text in [
            "",
            "port=53",
            "port=50,1",
            "uid=1000",
            "remote=10.0.0.0/8",
            "family=ipv4",
            "kind=flow",
            "state=LISTEN",
            "exclude_self",
            "not_local=128.0.0.0/1",
            "not_remote=10.0.0.0/16,::/0",
            "one_in=1",
        ] {
            assert!(matches(&event, text, unrelated), "{text}");
        }
        for text in [
            "port=54",
            "uid=0",
            "remote=11.0.0.0/8",
            "remote=::/0",
            "local=10.0.0.0/8",
            "family=ipv6",
            "kind=close",
            "cgroup=1",
            "cgroup_tree=1",
            "cgroup=1 cgroup_tree=2",
            "netns=1",
            "pid=7",
            "comm=x",
            "pid_tree=7",
            "not_local=127.0.0.1",
            "remote=10.0.0.0/8 not_remote=10.1.0.0/16",
            "exclude_loopback",
        ] {
            assert!(!matches(&event, text, unrelated), "{text}");
        }
        event.process = Some(Process {
            pid: 7,
            tid: 7,
            uid: 0,
            comm: Comm::from_bytes(b"x"),
            origin: Origin::User,
            cgroup: None,
            started: Duration::ZERO,
            details: None,
        });
        let member = Membership {
            is_in_tree: true,
            is_own: true,
        };
        let in_cgroup = &All(Membership::default(), true);
        let member = &All(member, false);
        assert!(matches(&event, "cgroup_tree=1", in_cgroup));
        assert!(matches(&event, "cgroup=1 cgroup_tree=2", in_cgroup));
        assert!(!matches(&event, "cgroup=1", in_cgroup));
        assert!(!matches(&event, "cgroup_tree=1", member));
        assert!(matches(&event, "pid=7,8 comm=x", unrelated));
        assert!(!matches(&event, "pid_tree=1", unrelated));
        assert!(matches(&event, "pid_tree=1", member));
        assert!(!matches(&event, "exclude_self", member));
        event.socket.local = "10.0.0.1:50".parse().unwrap();
        assert!(matches(&event, "exclude_loopback", unrelated));
        event.socket.remote = "[::1]:50".parse().unwrap();
        assert!(!matches(&event, "exclude_loopback", unrelated));
    }

    #[test]
    fn one_in_so_many_sockets_is_chosen() {
        // Each CPU counts its own ids.
        let ids = (0..64_u64).flat_map(|cpu| (0..2_000).map(move |id| cpu << 48 | id));
        for one_in in [1, 2, 3, 10, 1000] {
            let last = wire::last_of(one_in);
            let chosen = ids.clone().filter(|&id| wire::is_chosen(id, last)).count();
            let expected = 128_000.0 / f64::from(one_in);
            let difference = (chosen as f64 - expected).abs();
            assert!(difference <= 5.0 * expected.sqrt(), "{one_in}: {chosen}");
        }
        assert!(!wire::is_chosen(1, wire::last_of(u32::MAX)));
    }

    #[test]
    fn a_namespace_is_compared_by_its_cookie_too() {
        let mut event = Event::gap(
            0,
            LossStage::Ring,
            Protocol::Udp,
            SystemTime::UNIX_EPOCH,
            Duration::ZERO,
        );
        event.kind = EventKind::Connect;
        event.socket.netns = 8;
        let none = Namespace::NO_COOKIE;
        for (shown, allowed, passes) in [
            (5, 5, true),
            (5, 6, false),
            (5, none, false),
            // A kernel without cookies.
            (0, 0, true),
            (0, none, false),
        ] {
            event.socket.netns_cookie = NonZeroU64::new(shown);
            let inodes = [(8, passes), (9, false)];
            for (inode, passes) in inodes {
                let mut filter = Filter::new().netns(inode);
                filter.namespaces[0].cookie = allowed;
                let matches = filter.matches(&event, &UNRELATED);
                assert_eq!(matches, passes, "{shown} {allowed} {inode}");
            }
        }
    }

    #[test]
    fn the_end_of_a_socket_whose_flows_match_needs_no_peer() {
        let mut event = Event::gap(
            0,
            LossStage::Ring,
            Protocol::Udp,
            SystemTime::UNIX_EPOCH,
            Duration::ZERO,
        );
        event.kind = EventKind::Close {
            drops: 0,
            approximate: false,
        };
        event.socket.local = "[::]:50".parse().unwrap();
        event.socket.remote = "[::]:0".parse().unwrap();
        for (text, but_ends) in [
            ("port=53", true),
            ("remote=10.0.0.0/8 family=ipv4 local=10.0.0.1", true),
            ("kind=flow port=53", false),
            ("uid=7 port=53", false),
            ("pid=7", false),
        ] {
            let filter = text.parse::<Filter>().unwrap();
            assert!(!filter.matches(&event, &UNRELATED), "{text}");
            assert_eq!(
                filter.matches_but_ends(&event, &UNRELATED),
                but_ends,
                "{text}"
            );
        }
    }
}
