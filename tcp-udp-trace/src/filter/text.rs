//! A filter as text, and back.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use super::{Family, Filter, invalid};
use crate::{Comm, Error, TcpState, escape::Escaped};

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
            r"pid=1,2 pid_tree=3 uid=0 comm=a\x20b\x2cc\x5c\x0a port=443 local=127.0.0.1/32 remote=10.0.0.0/8,::/0 cgroup=7 netns=8 family=ipv4,ipv6 kind=state_change state=ESTABLISHED exclude_self"
        );
        assert_eq!(filter.to_string().parse::<Filter>().unwrap(), filter);
        assert_eq!("".parse::<Filter>().unwrap(), Filter::new());
        let one = "remote=::1".parse::<Filter>().unwrap();
        assert_eq!(one, Filter::new().remote(Ipv6Addr::LOCALHOST, 128));
    }
}
