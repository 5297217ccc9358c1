//! Which events are wanted.
//!
//! The kernel side decides before it makes a record ([`Compiled`] is what it is told). What user space produces itself, the totals
//! of UDP flows and the end of their sockets, is decided here, by the same rules ([`Filter::matches`]).

use std::{
    fmt::{self, Display},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use tcp_udp_trace_common::{
    AF_INET, AF_INET6,
    filter::{self as wire, Network},
};

use crate::{Comm, Error, ErrorKind, Event, Kind, Process, TcpState, escape::Escaped};

/// Which events a tracer shall report; without any restriction, all.
///
/// It works in the kernel: an event that is not wanted is turned out before it is written, and costs neither room in the buffer nor a
/// wake-up ([`Fate::rejected`](crate::Fate::rejected) counts them). What it restricts are the events, not what they tell: totals stay those of the
/// whole socket, from its beginning.
///
/// Values of the same setting are alternatives (`pid` and `pid_tree` count as the same one), different settings must all hold:
///
/// ```
/// # use tcp_udp_trace::Filter;
/// // Ports 80 or 443, and user 1000.
/// let filter = Filter::new().port(80).port(443).uid(1000);
/// assert_eq!(filter, "port=80,443 uid=1000".parse()?);
/// # Ok::<(), tcp_udp_trace::Error>(())
/// ```
///
/// At most 511 values and 511 networks in all. An event whose process, address or cgroup is not known passes no restriction of that. A gap ([`Lost`](crate::EventKind::Lost)) passes always.
/// Everything is checked when the filter is used: [`filter`](crate::TcpTracerBuilder::filter),
/// [`set_filter`](crate::TracerHandle::set_filter).
///
/// # Text
///
/// [`FromStr`] and `Display` know a text form: settings separated by blanks, each `name=value,value`. The names are those of the
/// methods; `kind` and `state` have the names of [`Kind`] and [`TcpState`], `family` is `ipv4` or `ipv6`, networks are `address/length` or one
/// address, a `comm` has blanks, commas and what cannot be printed as `\xNN`, `exclude_self` stands alone.
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
    namespaces: Vec<u32>,
    families: Vec<Family>,
    kinds: Vec<Kind>,
    states: Vec<TcpState>,
    exclude_self: bool,
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

/// A network, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Filter {
    /// One that lets everything pass.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sockets that this process owns. An id as the kernel's first PID namespace has it, as in [`Process::pid`]; not 0.
    pub fn pid(mut self, pid: u32) -> Self {
        self.pids.push(pid);
        self
    }

    /// Sockets that this process or a descendant of it owns: those that it has at the moment (by their chain of living parents),
    /// and all that they will ever have. A socket stays in when its process has ended. The process must
    /// be there when the filter is used. At most 4,096 processes at a time ([`Stats::untracked_processes`](crate::Stats::untracked_processes)
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

    /// Sockets of this network namespace: [`Socket::netns`](crate::Socket::netns); not 0.
    pub fn netns(mut self, inode: u32) -> Self {
        self.namespaces.push(inode);
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

    /// TCP: state changes from or to this state, and accepts and samples of sockets that are in it. UDP: no restriction.
    pub fn state(mut self, state: TcpState) -> Self {
        self.states.push(state);
        self
    }

    /// No sockets that the tracing process itself owns.
    pub fn exclude_self(mut self) -> Self {
        self.exclude_self = true;
        self
    }

    /// What the kernel side is to be told.
    ///
    /// # Errors
    ///
    /// `InvalidFilter`, which names the setting.
    pub(crate) fn compile(&self) -> Result<Compiled, Error> {
        let Self {
            pids,
            pid_trees,
            uids,
            comms,
            ports,
            local,
            remote,
            cgroups,
            namespaces,
            families,
            kinds,
            states,
            exclude_self,
        } = self;
        let mut compiled = Compiled {
            exclude_self: *exclude_self,
            ..Compiled::default()
        };
        if !kinds.is_empty() {
            compiled.word |= Kind::ALL.iter().map(|&kind| kind_bits(kind)).sum::<u64>();
            for &kind in kinds {
                compiled.word &= !kind_bits(kind);
            }
        }
        if !states.is_empty() {
            compiled.word |= wire::STATES;
            for &state in states {
                compiled.word &= !wire::no_state(state as u8);
            }
        }
        if !families.is_empty() {
            for (family, bit) in [(Family::Ipv4, wire::NO_IPV4), (Family::Ipv6, wire::NO_IPV6)] {
                if !families.contains(&family) {
                    compiled.word |= bit;
                }
            }
        }
        let number = |value: u64| [value, 0];
        let known = |name: &str, value: u64| match value {
            0 => Err(invalid(format!("{name} is 0: that means unknown"))),
            value => Ok(number(value)),
        };
        compiled.set(wire::PROCESS, wire::PID, pids, |&pid| {
            known("pid", pid.into())
        })?;
        for &pid in pid_trees {
            known("pid_tree", pid.into())?;
            compiled.word |= wire::PROCESS;
            if !compiled.roots.contains(&pid) {
                compiled.roots.push(pid);
            }
        }
        compiled.set(wire::UIDS, wire::UID, uids, |&uid| Ok(number(uid.into())))?;
        compiled.set(wire::COMMS, wire::COMM, comms, |comm| {
            if comm.as_bytes().is_empty() {
                return Err(invalid("comm is empty"));
            }
            let mut bytes = [0; Comm::LEN];
            bytes[..comm.as_bytes().len()].copy_from_slice(comm.as_bytes());
            Ok(zerocopy::transmute!(bytes))
        })?;
        compiled.set(wire::PORTS, wire::PORT, ports, |&port| {
            known("port", port.into())
        })?;
        compiled.set(wire::CGROUPS, wire::CGROUP, cgroups, |&id| {
            known("cgroup", id)
        })?;
        compiled.set(wire::NAMESPACES, wire::NETNS, namespaces, |&inode| {
            known("netns", inode.into())
        })?;
        for (name, bit, side, networks) in [
            ("local", wire::LOCAL, LOCAL_SIDE, local),
            ("remote", wire::REMOTE, REMOTE_SIDE, remote),
        ] {
            for network in networks {
                network
                    .check()
                    .map_err(|what| invalid(format!("{name} is {network}: {what}")))?;
                compiled.word |= bit;
                compiled.networks.push(SidedCidr {
                    side,
                    network: *network,
                });
            }
        }
        if *exclude_self {
            compiled.word |= wire::NOT_OWN;
        }
        let most = wire::MAX_VALUES as usize - 1;
        for (what, count) in [
            ("values", compiled.values.len() + compiled.roots.len()),
            ("networks", compiled.networks.len()),
        ] {
            if count > most {
                return Err(invalid(format!(
                    "the filter has {count} {what}: at most {most}"
                )));
            }
        }
        Ok(compiled)
    }

    /// Whether an event that user space made of what the programs had let pass before is still wanted. What the programs alone know of a
    /// process, `standing` tells.
    pub(crate) fn matches(&self, event: &Event, standing: impl Fn(&Process) -> Standing) -> bool {
        fn one_of<T: PartialEq>(wanted: &[T], value: &T) -> bool {
            wanted.is_empty() || wanted.contains(value)
        }
        let (process, socket) = (event.process.as_ref(), &event.socket);
        let owner = |wants: &dyn Fn(&Process) -> bool| process.is_some_and(wants);
        let ports = [socket.local.port(), socket.remote.port()];
        let within = |networks: &[Cidr], address: SocketAddr| {
            networks.is_empty() || networks.iter().any(|n| n.contains(address.ip()))
        };
        let Some(kind) = Kind::of(event) else {
            return true;
        };
        one_of(&self.kinds, &kind)
            && one_of(&self.uids, &socket.uid)
            && one_of(&self.cgroups, &socket.cgroup)
            && one_of(&self.namespaces, &socket.netns)
            && one_of(&self.families, &Family::of(socket.local.ip()))
            && (self.ports.is_empty() || ports.iter().any(|port| self.ports.contains(port)))
            && within(&self.local, socket.local)
            && within(&self.remote, socket.remote)
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
                .any(|&wanted| u64::from(wanted) == inode)
    }
}

/// What a process is to a filter.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Standing {
    /// One of a tree's.
    pub(crate) is_kin: bool,
    /// The tracing process itself.
    pub(crate) is_own: bool,
}

const LOCAL_SIDE: u8 = 0;
const REMOTE_SIDE: u8 = 1;

/// A filter in the form that the kernel side gets; without a generation yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Compiled {
    /// See [`wire`]; 0 if everything passes.
    pub(crate) word: u64,
    /// The set of each value, and the value.
    pub(crate) values: Vec<(u16, [u64; 2])>,
    pub(crate) networks: Vec<SidedCidr>,
    pub(crate) exclude_self: bool,
    /// The processes whose descendants are wanted, too.
    pub(crate) roots: Vec<u32>,
}

impl Compiled {
    fn set<T>(
        &mut self,
        bit: u64,
        set: u16,
        values: &[T],
        encode: impl Fn(&T) -> Result<[u64; 2], Error>,
    ) -> Result<(), Error> {
        for value in values {
            self.word |= bit;
            self.values.push((set, encode(value)?));
        }
        Ok(())
    }
}

/// The bits of the records that an event of this kind comes from.
fn kind_bits(kind: Kind) -> u64 {
    let records = kind.records().iter();
    records.map(|&record| wire::no_kind(record)).sum()
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFilter, what)
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

impl Cidr {
    /// How long its address is, in bits.
    const fn bits(self) -> u8 {
        match self.address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        }
    }

    fn check(self) -> Result<(), String> {
        let Self { address, length } = self;
        if length > self.bits() {
            return Err(format!("the length must be 0 to {}", self.bits()));
        }
        if address.to_canonical() != address {
            return Err(format!("write {} instead", address.to_canonical()));
        }
        let network = self.network(address);
        if network != Some(address) {
            return Err("it has bits beyond its length".into());
        }
        Ok(())
    }

    /// What is left of an address of this family.
    fn network(self, address: IpAddr) -> Option<IpAddr> {
        let host_bits = u32::from(self.bits().saturating_sub(self.length));
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
                Some(Ipv4Addr::from_bits(address.to_bits() & mask).into())
            }
            (IpAddr::V6(_), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                Some(Ipv6Addr::from_bits(address.to_bits() & mask).into())
            }
            _ => None,
        }
    }

    fn contains(self, address: IpAddr) -> bool {
        self.network(address) == Some(self.address)
    }
}

/// A network of local or of remote addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SidedCidr {
    side: u8,
    network: Cidr,
}

impl SidedCidr {
    /// As the programs get it.
    pub(crate) fn wire(&self, generation: u16) -> Network {
        let Cidr { address, length } = self.network;
        let (family, bytes) = match address {
            IpAddr::V4(address) => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&address.octets());
                (AF_INET, bytes)
            }
            IpAddr::V6(address) => (AF_INET6, address.octets()),
        };
        let words = zerocopy::transmute!(bytes);
        Network::new(generation, self.side, family, length.into(), words)
    }
}

impl Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, length } = self;
        write!(f, "{address}/{length}")
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| "not an IP address")?;
        let mut cidr = Self { address, length: 0 };
        cidr.length = match length {
            Some(length) => length.parse().map_err(|_| "not a length")?,
            None => cidr.bits(),
        };
        Ok(cidr)
    }
}

/// The text form, which parses back to an equal filter.
impl Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut blank = "";
        let mut list = |name: &str, values: Vec<String>| {
            if values.is_empty() {
                return Ok(());
            }
            write!(f, "{blank}{name}={}", values.join(","))?;
            blank = " ";
            Ok(())
        };
        list("pid", texts(&self.pids))?;
        list("pid_tree", texts(&self.pid_trees))?;
        list("uid", texts(&self.uids))?;
        list("comm", self.comms.iter().map(comm_text).collect())?;
        list("port", texts(&self.ports))?;
        list("local", texts(&self.local))?;
        list("remote", texts(&self.remote))?;
        list("cgroup", texts(&self.cgroups))?;
        list("netns", texts(&self.namespaces))?;
        list("family", texts(&self.families))?;
        list("kind", texts(&self.kinds))?;
        list("state", texts(&self.states))?;
        if self.exclude_self {
            write!(f, "{blank}exclude_self")?;
        }
        Ok(())
    }
}

fn texts<T: Display>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

/// A name without what separates values.
fn comm_text(comm: &Comm) -> String {
    let escaped = Escaped(comm.as_bytes()).to_string();
    let separators = |text: String, c: char| text.replace(c, &format!("\\x{:02x}", u32::from(c)));
    [' ', ','].into_iter().fold(escaped, separators)
}

impl FromStr for Filter {
    type Err = Error;

    /// # Errors
    ///
    /// `InvalidFilter`, which names the setting. That the values make sense is checked when the filter is used.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut filter = Self::new();
        for setting in text.split_ascii_whitespace() {
            let Some((name, values)) = setting.split_once('=') else {
                if setting == "exclude_self" {
                    filter.exclude_self = true;
                    continue;
                }
                return Err(invalid(format!(
                    "{:?}: a setting is name=value, or exclude_self",
                    Escaped(setting.as_bytes()).to_string()
                )));
            };
            filter.parse_setting(name, values)?;
        }
        Ok(filter)
    }
}

impl Filter {
    fn parse_setting(&mut self, name: &str, values: &str) -> Result<(), Error> {
        match name {
            "pid" => parse(name, values, &mut self.pids, number),
            "pid_tree" => parse(name, values, &mut self.pid_trees, number),
            "uid" => parse(name, values, &mut self.uids, number),
            "comm" => parse(name, values, &mut self.comms, |text| {
                text.parse().map_err(|error| format!("{error}"))
            }),
            "port" => parse(name, values, &mut self.ports, number),
            "local" => parse(name, values, &mut self.local, str::parse),
            "remote" => parse(name, values, &mut self.remote, str::parse),
            "cgroup" => parse(name, values, &mut self.cgroups, number),
            "netns" => parse(name, values, &mut self.namespaces, number),
            "family" => parse(name, values, &mut self.families, |text| {
                let mut families = [Family::Ipv4, Family::Ipv6].into_iter();
                let named = families.find(|family| family.name() == text);
                named.ok_or_else(|| "it is ipv4 or ipv6".into())
            }),
            "kind" => parse(name, values, &mut self.kinds, |text| {
                text.parse().map_err(|error| format!("{error}"))
            }),
            "state" => parse(name, values, &mut self.states, |text| {
                let mut states = (0..=u8::MAX).filter_map(TcpState::from_number);
                let named = states.find(|state| state.name() == text);
                named.ok_or_else(|| "no state of TCP, such as ESTABLISHED".into())
            }),
            _ => Err(invalid(format!(
                "there is no setting {:?}: there are pid, pid_tree, uid, comm, port, local, remote, cgroup, netns, family, kind, \
                 state and exclude_self",
                Escaped(name.as_bytes()).to_string()
            ))),
        }
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String>
where
    T::Err: Display,
{
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn parse<T>(
    name: &str,
    values: &str,
    to: &mut Vec<T>,
    value: impl Fn(&str) -> Result<T, String>,
) -> Result<(), Error> {
    for text in values.split(',') {
        let parsed = value(text).map_err(|what| {
            let text = Escaped(text.as_bytes());
            invalid(format!("{name} is \"{text}\": {what}"))
        })?;
        to.push(parsed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use tcp_udp_trace_common::kind as record;

    use super::*;
    use crate::{EventKind, LossStage, Origin, Protocol};

    fn everything() -> Filter {
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
            .netns(8)
            .family(Family::Ipv4)
            .family(Family::Ipv6)
            .kind(Kind::StateChange)
            .state(TcpState::Established)
            .exclude_self()
    }

    #[test]
    fn text_parses_back() {
        let filter = everything();
        assert_eq!(
            filter.to_string(),
            r"pid=1,2 pid_tree=3 uid=0 comm=a\x20b\x2cc\x5c\x0a port=443 local=127.0.0.1/32 remote=10.0.0.0/8,::/0 cgroup=7 netns=8 family=ipv4,ipv6 kind=state_change state=ESTABLISHED exclude_self"
        );
        assert_eq!(filter.to_string().parse::<Filter>().unwrap(), filter);
        assert_eq!("".parse::<Filter>().unwrap(), Filter::new());
        let one = "remote=::1".parse::<Filter>().unwrap();
        assert_eq!(one, Filter::new().remote(Ipv6Addr::LOCALHOST, 128));
    }

    #[test]
    fn what_makes_no_sense_names_itself() {
        let check = |text: &str, named: &str| {
            let parsed = text.parse::<Filter>();
            let error = parsed.and_then(|filter| filter.compile()).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidFilter);
            assert!(error.to_string().starts_with(named), "{error}");
        };
        check("pid=0", "pid is 0");
        check("pid=-1", "pid is \"-1\"");
        check("pid=1,", "pid is \"\"");
        check("pid_tree=0", "pid_tree is 0");
        check("port=65536", "port is \"65536\"");
        check("port=0", "port is 0");
        check("comm=", "comm is empty");
        check("comm=0123456789abcdef", "comm is \"0123456789abcdef\"");
        check("local=1.2.3.4/33", "local is 1.2.3.4/33: the length");
        check("remote=10.0.0.1/8", "remote is 10.0.0.1/8: it has bits");
        check(
            "remote=::ffff:1.2.3.4",
            "remote is ::ffff:1.2.3.4/128: write 1.2.3.4",
        );
        check(
            "remote=localhost",
            "remote is \"localhost\": not an IP address",
        );
        check("cgroup=0", "cgroup is 0");
        check("netns=0", "netns is 0");
        check("family=ipx", "family is \"ipx\"");
        check("kind=lost", "kind is \"lost\"");
        check("state=established", "state is \"established\"");
        check("color=red", "there is no setting \"color\"");
        check("443", "\"443\": a setting is name=value");
        check(
            &format!("port={}", ["1"; 512].join(",")),
            "the filter has 512 values",
        );
    }

    #[test]
    fn nothing_restricted_is_the_word_0() {
        assert_eq!(Filter::new().compile().unwrap(), Compiled::default());
        let word = everything().compile().unwrap().word;
        assert_eq!(word & wire::of_generation(u16::MAX), 0, "{word:x}");
        assert_eq!(word & wire::no_kind(record::STATE_CHANGE), 0);
        assert_ne!(word & wire::no_kind(record::ACCEPT), 0);
        assert_eq!(word & (wire::NO_IPV4 | wire::NO_IPV6), 0);
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
        event.kind = EventKind::Flow { approximate: false };
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
}
