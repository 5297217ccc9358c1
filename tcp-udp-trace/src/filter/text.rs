//! The text form of a filter.

use std::{
    fmt::{self, Display},
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{Family, Filter, Namespace, invalid};
use crate::{
    error::Error,
    event::{
        Direction,
        comm::Comm,
        escape::{Escaped, unescape},
        tcp_state::TcpState,
    },
};

/// Shows the text form, which parses back to an equal filter.
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
        list("not_local", texts(&self.not_local))?;
        list("not_remote", texts(&self.not_remote))?;
        let cgroups = |ids: Vec<String>, paths: &[PathBuf]| {
            let paths = paths.iter().map(|path| path_text(path));
            ids.into_iter().chain(paths).collect()
        };
        list("cgroup", cgroups(texts(&self.cgroups), &self.cgroup_paths))?;
        list(
            "cgroup_tree",
            cgroups(texts(&self.cgroup_trees), &self.cgroup_tree_paths),
        )?;
        list("netns", texts(&self.namespaces))?;
        list("family", texts(&self.families))?;
        list("kind", texts(&self.kinds))?;
        list("state", texts(&self.states))?;
        list("direction", texts(&self.directions))?;
        list("one_in", texts(self.one_in.as_slice()))?;
        for (name, is_set) in [
            ("only_self", self.only_self),
            ("exclude_self", self.exclude_self),
            ("exclude_loopback", self.exclude_loopback),
        ] {
            if is_set {
                write!(f, "{blank}{name}")?;
                blank = " ";
            }
        }
        Ok(())
    }
}

fn texts<T: Display>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

/// Returns a process name without separators of values.
fn comm_text(comm: &Comm) -> String {
    bytes_text(comm.as_bytes())
}

/// Returns a path without separators of values.
pub(super) fn path_text(path: &Path) -> String {
    bytes_text(path.as_os_str().as_encoded_bytes())
}

fn bytes_text(bytes: &[u8]) -> String {
    let escaped = Escaped(bytes).to_string();
    let separators = |text: String, c: char| text.replace(c, &format!("\\x{:02x}", u32::from(c)));
    [' ', ','].into_iter().fold(escaped, separators)
}

impl FromStr for Filter {
    type Err = Error;

    /// # Errors
    ///
    /// `InvalidFilter`, which names the setting. The tracer checks the values when the filter is
    /// set.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut filter = Self::new();
        for setting in text.split_ascii_whitespace() {
            let Some((name, values)) = setting.split_once('=') else {
                match setting.to_ascii_lowercase().as_str() {
                    "only_self" => filter.only_self = true,
                    "exclude_self" => filter.exclude_self = true,
                    "exclude_loopback" => filter.exclude_loopback = true,
                    _ => {
                        return Err(invalid(format!(
                            "{:?}: a setting is name=value, only_self, exclude_self or exclude_loopback",
                            Escaped(setting.as_bytes()).to_string()
                        )));
                    }
                }
                continue;
            };
            filter.parse_setting(&name.to_ascii_lowercase(), values)?;
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
            "comm" => parse(name, values, &mut self.comms, comm),
            "port" => parse(name, values, &mut self.ports, number),
            "local" => parse(name, values, &mut self.local, str::parse),
            "remote" => parse(name, values, &mut self.remote, str::parse),
            "not_local" => parse(name, values, &mut self.not_local, str::parse),
            "not_remote" => parse(name, values, &mut self.not_remote, str::parse),
            "cgroup" => parse_cgroups(name, values, &mut self.cgroups, &mut self.cgroup_paths),
            "cgroup_tree" => parse_cgroups(
                name,
                values,
                &mut self.cgroup_trees,
                &mut self.cgroup_tree_paths,
            ),
            "direction" => parse(name, values, &mut self.directions, |text| {
                [Direction::Outbound, Direction::Inbound, Direction::Listener]
                    .into_iter()
                    .find(|direction| text.eq_ignore_ascii_case(direction.name()))
                    .ok_or_else(|| "one of outbound, inbound, listener".into())
            }),
            "one_in" => {
                let mut all = Vec::new();
                parse(name, values, &mut all, number)?;
                let [one_in] = all[..] else {
                    return Err(invalid(format!("{name} has one value")));
                };
                self.one_in = Some(one_in);
                Ok(())
            }
            "netns" => parse(name, values, &mut self.namespaces, |text| {
                number::<u32>(text).map(Namespace::from)
            }),
            "family" => parse(name, values, &mut self.families, |text| {
                let mut families = [Family::Ipv4, Family::Ipv6].into_iter();
                let named = families.find(|family| family.name().eq_ignore_ascii_case(text));
                named.ok_or_else(|| "a family is ipv4 or ipv6".into())
            }),
            "kind" => parse(name, values, &mut self.kinds, |text| {
                let lower = text.to_ascii_lowercase();
                lower.parse().map_err(|error| format!("{error}"))
            }),
            "state" => parse(name, values, &mut self.states, |text| {
                let mut states = (0..=u8::MAX).filter_map(TcpState::from_number);
                let named = states.find(|state| state.name().eq_ignore_ascii_case(text));
                named.ok_or_else(|| "not a TCP state, such as ESTABLISHED".into())
            }),
            _ => Err(invalid(format!(
                "there is no setting {:?}: there are pid, pid_tree, uid, comm, port, local, remote, not_local, not_remote, cgroup, cgroup_tree, \
                 netns, family, kind, state, direction, one_in, only_self, exclude_self and exclude_loopback",
                Escaped(name.as_bytes()).to_string()
            ))),
        }
    }
}

/// Parses ids and paths. Paths begin with a slash.
fn parse_cgroups<T: From<u64>>(
    name: &str,
    values: &str,
    ids: &mut Vec<T>,
    paths: &mut Vec<PathBuf>,
) -> Result<(), Error> {
    for value in values.split(',') {
        if value.starts_with('/') {
            parse(name, value, paths, path)?;
        } else {
            parse(name, value, ids, |text| {
                let id = number::<u64>(text).map(T::from);
                id.map_err(|message| format!("an id, or an absolute path: {message}"))
            })?;
        }
    }
    Ok(())
}

/// Parses a process name. The kernel truncates a longer one.
fn comm(text: &str) -> Result<Comm, String> {
    match unescape(text) {
        Some(bytes) if !bytes.contains(&0) => Ok(Comm::from_bytes(&bytes)),
        _ => Err("not a process name: no NUL, a backslash only as part of \\xNN".into()),
    }
}

fn path(text: &str) -> Result<PathBuf, String> {
    unescape(text)
        .and_then(path_of)
        .ok_or_else(|| "a backslash that is not part of \\xNN".into())
}

#[cfg(unix)]
fn path_of(bytes: Vec<u8>) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    Some(std::ffi::OsString::from_vec(bytes).into())
}

#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> Option<PathBuf> {
    String::from_utf8(bytes).ok().map(PathBuf::from)
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
        let parsed = value(text).map_err(|message| {
            let text = Escaped(text.as_bytes());
            invalid(format!("{name} is \"{text}\": {message}"))
        })?;
        to.push(parsed);
    }
    Ok(())
}

impl Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::{super::tests::everything, *};

    #[test]
    fn text_parses_back() {
        let filter = everything();
        assert_eq!(
            filter.to_string(),
            r"pid=1,2 pid_tree=3 uid=0 comm=a\x20b\x2cc\x5c\x0a port=443 local=127.0.0.1/32 remote=10.0.0.0/8,::/0 not_local=10.1.0.0/16 not_remote=::1/128 cgroup=7,/a\x20b\x2cc cgroup_tree=9,/d\x20e netns=8 family=ipv4,ipv6 kind=state_change state=ESTABLISHED direction=outbound,listener one_in=10 only_self exclude_self exclude_loopback"
        );
        assert_eq!(filter.to_string().parse::<Filter>().unwrap(), filter);
        assert_eq!("".parse::<Filter>().unwrap(), Filter::new());
        let one = "remote=::1".parse::<Filter>().unwrap();
        assert_eq!(one, Filter::new().remote(Ipv6Addr::LOCALHOST, 128));
    }

    #[test]
    fn keywords_are_in_upper_or_lower_case() {
        for (text, plain) in [
            ("state=established,Fin_Wait2", "state=ESTABLISHED,FIN_WAIT2"),
            ("KIND=Accept,state_Change", "kind=accept,state_change"),
            ("Family=IPv4", "family=ipv4"),
            ("Exclude_Self", "exclude_self"),
            ("ONLY_SELF Cgroup=/A", "cgroup=/A only_self"),
            // Names of processes are not keywords.
            ("comm=Nginx", "comm=Nginx"),
        ] {
            assert_eq!(text.parse::<Filter>().unwrap().to_string(), plain);
        }
    }

    #[test]
    fn the_first_15_bytes_of_a_name_are_compared() {
        for (text, compared) in [
            ("comm=0123456789abcde", "comm=0123456789abcde"),
            ("comm=0123456789abcdef", "comm=0123456789abcde"),
            (r"comm=kworker/u8:2-events_unbound", "comm=kworker/u8:2-ev"),
            (r"comm=\x0a23456789abcdefghi", r"comm=\x0a23456789abcdef"),
        ] {
            assert_eq!(text.parse::<Filter>().unwrap().to_string(), compared);
        }
    }
}
