//! Which events are wanted.
//!
//! The kernel side decides before it makes a record ([`Compiled`] is what it is told). What user space produces itself, the totals
//! of UDP flows and the end of their sockets, is decided here, by the same rules ([`Filter::matches`]).

mod compiled;
mod network;
mod resolved;
mod text;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU64,
    path::PathBuf,
};

use self::network::Cidr;
pub(crate) use self::{compiled::Compiled, resolved::Names};
use crate::{Comm, Error, ErrorKind, Event, Kind, Process, Socket, TcpState};

/// Which events a tracer shall report; without any restriction, all.
///
/// It works in the kernel: an event that is not wanted is turned out before it is written, and costs neither room in the buffer nor a
/// wake-up ([`Fate::rejected`](crate::Fate::rejected) counts them). What it restricts are the events, not what they tell: totals stay those of the
/// whole socket, from its beginning.
///
/// Values of the same setting are alternatives, different settings must all hold. `pid`, `pid_tree` and
/// `only_self` count as the same setting, and so do `cgroup` and `cgroup_path`:
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
/// [`family`](Self::family) if one of the socket's flows passes the filter, as far as the tracer
/// still remembers these flows ([`Stats::flows_evicted`](crate::Stats::flows_evicted)).
///
/// At most 511 values and 511 networks in all. An event whose process, address or cgroup is not known passes no restriction of that. A gap ([`Lost`](crate::EventKind::Lost)) passes always.
/// Everything is checked when the filter is used: [`filter`](crate::TcpTracerBuilder::filter),
/// [`set_filter`](crate::TracerHandle::set_filter).
///
/// # Text
///
/// [`FromStr`](std::str::FromStr) and `Display` know a text form: settings separated by blanks, each
/// `name=value,value`. The names are those of the methods:
///
/// - `kind` and `state` have the names of [`Kind`] and [`TcpState`], `family` is `ipv4` or `ipv6`.
/// - Networks are `address/length` or one address.
/// - A `comm` has blanks, commas and what cannot be printed as `\xNN`. Of a longer name, the first
///   15 bytes are compared, which is what the kernel keeps.
/// - A `cgroup` is an id, or an absolute path in the same form as a `comm`.
/// - `only_self` and `exclude_self` stand alone.
///
/// Names of settings, kinds, states and families may be in upper or lower case.
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
    cgroups: Vec<u64>,
    cgroup_paths: Vec<PathBuf>,
    namespaces: Vec<Namespace>,
    families: Vec<Family>,
    kinds: Vec<Kind>,
    states: Vec<TcpState>,
    only_self: bool,
    exclude_self: bool,
}

/// A network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Namespace {
    /// Its name in the filter.
    inode: u32,
    /// Distinguishes it from earlier and later namespaces with the inode. 0 until the filter is
    /// [resolved](Filter::resolve), and where the kernel has no cookies.
    cookie: u64,
}

impl Namespace {
    /// The cookie of no namespace.
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

/// A family of addresses. An IPv4-mapped IPv6 address is the IPv4 address that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Filter {
    /// One that lets everything pass.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sockets that this process owns; not 0.
    ///
    /// It is a number of the pid namespace that the tracing process is in, as `/proc` there shows it.
    /// Outside of containers this is the number in [`Process::pid`]. In a child namespace, the number is
    /// translated when the filter is used, so the process must exist then. Events keep showing the
    /// initial namespace's number.
    pub fn pid(mut self, pid: u32) -> Self {
        self.pids.push(pid);
        self
    }

    /// Sockets that this process or a descendant of it owns: those that it has at the moment (by their chain of living parents),
    /// and all that they will ever have. A socket stays in when its process has ended. The process must
    /// be there when the filter is used, and is numbered as for [`pid`](Self::pid). At most 4,096 processes at a time ([`Stats::untracked_processes`](crate::Stats::untracked_processes)
    /// counts those beyond).
    ///
    /// It takes two more programs in the kernel, at `sched_process_fork` and `sched_process_free`.
    pub fn pid_tree(mut self, pid: u32) -> Self {
        self.pid_trees.push(pid);
        self
    }

    /// Sockets that the kernel charges to this user: [`Socket::uid`](crate::Socket::uid).
    pub fn uid(mut self, uid: u32) -> Self {
        self.uids.push(uid);
        self
    }

    /// Sockets that a process of this name owns: all of [`Process::comm`], as it was when the process became the owner; not empty.
    /// [`Comm::from_bytes`] takes the first 15 bytes of a longer name, as the kernel does.
    pub fn comm(mut self, comm: Comm) -> Self {
        self.comms.push(comm);
        self
    }

    /// Sockets with this port, on either side; not 0.
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// Sockets whose address on this side is in this network: `length` is how many bits of it count, 0 to 32 or 128; the others must be 0.
    pub fn local(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.local.push(Cidr { address, length });
        self
    }

    /// Sockets whose peer's address is in this network, as for [`local`](Self::local). A UDP socket that is not connected has no peer, but each of
    /// its flows and datagrams has.
    pub fn remote(mut self, address: impl Into<IpAddr>, length: u8) -> Self {
        let address = address.into();
        self.remote.push(Cidr { address, length });
        self
    }

    /// Sockets that were made in this cgroup, not in one below it: [`Socket::cgroup`](crate::Socket::cgroup); not 0.
    pub fn cgroup(mut self, id: u64) -> Self {
        self.cgroups.push(id);
        self
    }

    /// Sockets that were made in the cgroup at this path, not in one below it.
    ///
    /// The path is absolute, and is one of these:
    ///
    /// - the path of the folder, below the mount point of cgroup v2, such as
    ///   `/sys/fs/cgroup/system.slice/nginx.service`;
    /// - the path in the cgroup v2 hierarchy, as the line `0::` of `/proc/PID/cgroup` shows it, such as
    ///   `/system.slice/nginx.service`. It begins at the machine's root cgroup if that is mounted here, else
    ///   at the root of the cgroup namespace.
    ///
    /// The path is looked up once, when the filter is used. If the cgroup is removed and made again, it has
    /// another id, and the filter must be set again. Refused are paths that do not exist, and those of a
    /// cgroup v1 hierarchy, by which sockets are not known.
    pub fn cgroup_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.cgroup_paths.push(path.into());
        self
    }

    /// Sockets of the network namespace that has this inode number when the filter is used:
    /// [`Socket::netns`](crate::Socket::netns); not 0.
    ///
    /// Later, the kernel gives the number of a namespace that has ended to another one. That one is
    /// not meant: the programs compare the namespace's cookie, too
    /// ([`Socket::netns_cookie`](crate::Socket::netns_cookie)). If no namespace has the number when
    /// the filter is used, nothing passes, and the library logs a warning.
    ///
    /// Before Linux 5.12, namespaces have no cookies. There, the number alone is compared.
    pub fn netns(mut self, inode: u32) -> Self {
        self.namespaces.push(inode.into());
        self
    }

    /// Sockets whose addresses are of this family.
    pub fn family(mut self, family: Family) -> Self {
        self.families.push(family);
        self
    }

    /// Events of this kind. Those of the other protocol are no mistake: two tracers may have the same filter.
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kinds.push(kind);
        self
    }

    /// TCP: state changes from or to this state, and other events of sockets that are in it. The
    /// socket of a [`ConnectFailed`](crate::EventKind::ConnectFailed) is in `CLOSE`. UDP: no
    /// restriction.
    pub fn state(mut self, state: TcpState) -> Self {
        self.states.push(state);
        self
    }

    /// Sockets that the tracing process itself owns, in whatever pid namespace it is.
    pub fn only_self(mut self) -> Self {
        self.only_self = true;
        self
    }

    /// No sockets that the tracing process itself owns.
    pub fn exclude_self(mut self) -> Self {
        self.exclude_self = true;
        self
    }

    /// Whether an event that user space made of what the programs had let pass before is still wanted. What the programs alone know of a
    /// process, `standing` tells. The filter is a [resolved](Self::resolve) one.
    pub(crate) fn matches(&self, event: &Event, standing: impl Fn(&Process) -> Standing) -> bool {
        self.matches_ends(event) && self.matches_but_ends(event, standing)
    }

    /// Whether the ports and addresses of an event are wanted.
    fn matches_ends(&self, event: &Event) -> bool {
        if Kind::of(event).is_none() {
            return true;
        }
        let (local, remote) = (event.socket.local, event.socket.remote);
        let ports = [local.port(), remote.port()];
        let within = |networks: &[Cidr], address: SocketAddr| {
            networks.is_empty() || networks.iter().any(|n| n.contains(address.ip()))
        };
        one_of(&self.families, &Family::of(local.ip()))
            && (self.ports.is_empty() || ports.iter().any(|port| self.ports.contains(port)))
            && within(&self.local, local)
            && within(&self.remote, remote)
    }

    /// Whether everything else of an event is wanted. The end of a UDP socket one of whose flows
    /// [matches](Self::matches) needs no more than that.
    pub(crate) fn matches_but_ends(
        &self,
        event: &Event,
        standing: impl Fn(&Process) -> Standing,
    ) -> bool {
        let (process, socket) = (event.process.as_ref(), &event.socket);
        let owner = |wants: &dyn Fn(&Process) -> bool| process.is_some_and(wants);
        let Some(kind) = Kind::of(event) else {
            return true;
        };
        one_of(&self.kinds, &kind)
            && one_of(&self.uids, &socket.uid)
            && one_of(&self.cgroups, &socket.cgroup)
            && (self.namespaces.is_empty() || self.namespaces.iter().any(|one| one.is_of(socket)))
            && (self.comms.is_empty() || owner(&|process| self.comms.contains(&process.comm)))
            && (!self.exclude_self || !owner(&|process| standing(process).is_own))
            && (self.pids.is_empty() && self.pid_trees.is_empty()
                || owner(&|process| self.pids.contains(&process.pid))
                || !self.pid_trees.is_empty() && owner(&|process| standing(process).is_kin))
    }

    /// Whether samples are wanted at all.
    pub(crate) fn wants_samples(&self) -> bool {
        self.kinds.is_empty() || self.kinds.contains(&Kind::Sample)
    }

    /// Whether anything in this network namespace is wanted.
    pub(crate) fn wants_netns(&self, inode: u64) -> bool {
        self.namespaces.is_empty()
            || self
                .namespaces
                .iter()
                .any(|wanted| u64::from(wanted.inode) == inode)
    }
}

/// Whether a list lets a value pass: an empty one restricts nothing.
fn one_of<T: PartialEq>(wanted: &[T], value: &T) -> bool {
    wanted.is_empty() || wanted.contains(value)
}

/// What a process is to a filter.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Standing {
    /// One of a tree's.
    pub(crate) is_kin: bool,
    /// The tracing process itself.
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

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFilter, what)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::{EventKind, LossStage, Origin, Protocol};

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
            .cgroup(7)
            .cgroup_path("/a b,c")
            .netns(8)
            .family(Family::Ipv4)
            .family(Family::Ipv6)
            .kind(Kind::StateChange)
            .state(TcpState::Established)
            .only_self()
            .exclude_self()
    }

    #[test]
    fn user_space_decides_as_the_kernel_does() {
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
        let matches = |event: &Event, text: &str, standing| {
            let filter = text.parse::<Filter>().unwrap();
            filter.matches(event, |_| standing)
        };
        let nobody = Standing::default();
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
        ] {
            assert!(matches(&event, text, nobody), "{text}");
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
            "netns=1",
            "pid=7",
            "comm=x",
            "pid_tree=7",
        ] {
            assert!(!matches(&event, text, nobody), "{text}");
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
        let kin = Standing {
            is_kin: true,
            is_own: true,
        };
        assert!(matches(&event, "pid=7,8 comm=x", nobody));
        assert!(!matches(&event, "pid_tree=1", nobody));
        assert!(matches(&event, "pid_tree=1", kin));
        assert!(!matches(&event, "exclude_self", kin));
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
        for (shown, wanted, is_wanted) in [
            (5, 5, true),
            (5, 6, false),
            (5, none, false),
            // A kernel without cookies.
            (0, 0, true),
            (0, none, false),
        ] {
            event.socket.netns_cookie = NonZeroU64::new(shown);
            let inodes = [(8, is_wanted), (9, false)];
            for (inode, is_wanted) in inodes {
                let mut filter = Filter::new().netns(inode);
                filter.namespaces[0].cookie = wanted;
                let matches = filter.matches(&event, |_| Standing::default());
                assert_eq!(matches, is_wanted, "{shown} {wanted} {inode}");
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
            let nobody = |_: &Process| Standing::default();
            assert!(!filter.matches(&event, nobody), "{text}");
            assert_eq!(filter.matches_but_ends(&event, nobody), but_ends, "{text}");
        }
    }
}
