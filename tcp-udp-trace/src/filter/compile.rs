//! The form of a filter for the programs.

use std::collections::BTreeSet;

use tcp_udp_trace_common::{direction as numbers, filter as wire};

use super::{
    CgroupTree, Family, Filter,
    cidr::{Cidr, SidedCidr},
    invalid,
};
use crate::{
    error::Error,
    event::{Direction, comm::Comm, kind::Kind},
};

/// A filter in the form of the kernel side, without a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Compiled {
    /// See [`wire`]; 0 if everything passes.
    pub(crate) word: u64,
    /// See [`wire::argument`].
    pub(crate) argument: u64,
    /// The set of each value, and the value.
    pub(crate) values: Vec<(u16, [u64; 2])>,
    pub(crate) networks: Vec<SidedCidr>,
    pub(crate) exclude_self: bool,
    /// The processes whose descendants pass, too.
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

const LOCAL_SIDE: u8 = 0;
const REMOTE_SIDE: u8 = 1;

impl Filter {
    /// Compiles a [resolved](Self::resolve) filter for the kernel side. For another filter, this
    /// only checks the values.
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
            not_local,
            not_remote,
            cgroups,
            cgroup_paths: _,
            cgroup_trees,
            cgroup_tree_paths: _,
            namespaces,
            families,
            kinds,
            states,
            directions,
            one_in,
            only_self: _,
            exclude_self,
            exclude_loopback,
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
        for &direction in directions {
            compiled.word |= wire::direction(direction_number(direction));
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
            0 => Err(invalid(format!("{name} is 0: that has no meaning here"))),
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
        compiled.set(wire::CGROUPS, wire::CGROUP_ROOT, cgroup_trees, |tree| {
            known("cgroup_tree", tree.id)
        })?;
        compiled.set(wire::NAMESPACES, wire::NETNS, namespaces, |namespace| {
            let [inode, _] = known("netns", namespace.inode.into())?;
            Ok([inode, namespace.cookie])
        })?;
        for (name, networks) in [
            ("local", local),
            ("remote", remote),
            ("not_local", not_local),
            ("not_remote", not_remote),
        ] {
            for network in networks {
                network
                    .check()
                    .map_err(|message| invalid(format!("{name} is {network}: {message}")))?;
            }
        }
        for (bit, side, passing, excluded) in [
            (wire::LOCAL, LOCAL_SIDE, local, not_local),
            (wire::REMOTE, REMOTE_SIDE, remote, not_remote),
        ] {
            let mut excluded = excluded.clone();
            if *exclude_loopback {
                excluded.extend(Cidr::LOOPBACK);
            }
            if !passing.is_empty() || !excluded.is_empty() {
                compiled.word |= bit;
                compiled.networks.extend(networks(side, passing, &excluded));
            }
        }
        let mut last = 0;
        if let Some(one_in) = *one_in {
            known("one_in", one_in.into())?;
            compiled.word |= wire::ONE_IN;
            last = wire::last_of(one_in);
        }
        compiled.argument = wire::argument(last, levels(cgroup_trees)?);
        if *exclude_self {
            compiled.word |= wire::NOT_OWN;
        }
        let most = wire::MAX_VALUES as usize - 1;
        for (values, count) in [
            ("values", compiled.values.len() + compiled.roots.len()),
            (
                "networks",
                local.len() + remote.len() + not_local.len() + not_remote.len(),
            ),
        ] {
            if count > most {
                return Err(invalid(format!(
                    "the filter has {count} {values}: at most {most}"
                )));
            }
        }
        Ok(compiled)
    }
}

/// Returns the levels that trees of cgroups begin at.
fn levels(trees: &[CgroupTree]) -> Result<BTreeSet<u8>, Error> {
    let levels: BTreeSet<_> = trees.iter().map(|tree| tree.level).collect();
    let most = wire::TREE_LEVELS as usize;
    if levels.len() > most {
        return Err(invalid(format!(
            "cgroup_tree has cgroups at {} levels of the hierarchy: at most {most}",
            levels.len()
        )));
    }
    Ok(levels)
}

/// Returns the networks of a side so that the smallest network of an address shows whether the
/// address passes: it is in one that passes, if there is one, and in none that is excluded.
fn networks(side: u8, passing: &[Cidr], excluded: &[Cidr]) -> Vec<SidedCidr> {
    let sided = |network, is_excluded| SidedCidr {
        side,
        network,
        is_excluded,
    };
    let passing = if passing.is_empty() {
        &Cidr::ALL
    } else {
        passing
    };
    let is_excluded = |network: &Cidr| excluded.iter().any(|other| other.covers(*network));
    let passing = passing.iter().filter(|network| !is_excluded(network));
    let passing = passing.map(|&network| sided(network, false));
    passing
        .chain(excluded.iter().map(|&network| sided(network, true)))
        .collect()
}

const fn direction_number(direction: Direction) -> u8 {
    match direction {
        Direction::Outbound => numbers::OUTBOUND,
        Direction::Inbound => numbers::INBOUND,
        Direction::Listener => numbers::LISTENER,
    }
}

/// The bits of the records that an event of this kind comes from.
fn kind_bits(kind: Kind) -> u64 {
    let records = kind.records().iter();
    records.map(|&record| wire::no_kind(record)).sum()
}

#[cfg(test)]
mod tests {
    use tcp_udp_trace_common::kind as record;

    use super::{super::tests::everything, *};
    use crate::error::ErrorKind;

    #[test]
    fn errors_name_the_invalid_setting() {
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
        check(r"comm=a\x00b", r#"comm is "a\x5cx00b""#);
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
        check("cgroup_tree=0", "cgroup_tree is 0");
        check(
            "cgroup_tree=a/b",
            "cgroup_tree is \"a/b\": an id, or an absolute path",
        );
        check("direction=up", "direction is \"up\"");
        check("one_in=0", "one_in is 0");
        check("one_in=1,2", "one_in has one value");
        check("not_local=10.0.0.1/8", "not_local is 10.0.0.1/8: it has");
        check("not_remote=x", "not_remote is \"x\": not an IP address");
        check("netns=0", "netns is 0");
        check("family=ipx", "family is \"ipx\"");
        check("kind=lost", "kind is \"lost\"");
        check("state=open", "state is \"open\"");
        check(
            "cgroup=a/b",
            "cgroup is \"a/b\": an id, or an absolute path",
        );
        check("color=red", "there is no setting \"color\"");
        check("443", "\"443\": a setting is name=value");
        check(
            &format!("port={}", ["1"; 512].join(",")),
            "the filter has 512 values",
        );
    }

    /// The smallest network decides as all networks together do.
    #[test]
    fn the_smallest_network_decides() {
        let addresses = [
            "10.1.2.3",
            "10.1.3.3",
            "10.2.0.1",
            "11.0.0.1",
            "::1",
            "2001:db8::1",
        ];
        for text in [
            "local=10.0.0.0/8",
            "not_local=10.0.0.0/8",
            "local=10.0.0.0/8 not_local=10.1.0.0/16",
            "local=10.1.0.0/16,11.0.0.0/8 not_local=10.0.0.0/8",
            "local=10.1.2.0/24,10.0.0.0/8 not_local=10.1.0.0/16",
            "local=10.1.2.3 not_local=10.1.2.3",
            "local=::/0 not_local=::1",
            "not_local=0.0.0.0/0",
            "not_local=::/0,10.1.2.0/24",
            "not_local=10.0.0.0/8,10.1.0.0/16",
        ] {
            let filter: Filter = text.parse().unwrap();
            let networks = filter.compile().unwrap().networks;
            for address in addresses.map(|address| address.parse().unwrap()) {
                let is_in = |networks: &[Cidr]| networks.iter().any(|n| n.contains(address));
                let passes =
                    (filter.local.is_empty() || is_in(&filter.local)) && !is_in(&filter.not_local);
                let smallest = networks.iter().filter(|n| n.network.contains(address));
                let smallest = smallest.max_by_key(|n| n.network.length);
                let found = smallest.is_some_and(|n| !n.is_excluded);
                assert_eq!(found, passes, "{text}: {address}");
            }
        }
    }

    #[test]
    fn an_empty_filter_is_the_word_0() {
        assert_eq!(Filter::new().compile().unwrap(), Compiled::default());
        let word = everything().compile().unwrap().word;
        assert_eq!(word & wire::of_generation(u16::MAX), 0, "{word:x}");
        assert_eq!(word & wire::no_kind(record::STATE_CHANGE), 0);
        assert_ne!(word & wire::no_kind(record::ACCEPT), 0);
        assert_eq!(word & (wire::NO_IPV4 | wire::NO_IPV6), 0);
    }
}
