//! The command `depmap`: each process and the addresses that it exchanges data with.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::ArgGroup;
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use tcp_udp_trace::{
    Comm, Direction, Event, Filter, Protocol, Stats, TcpTracer, UdpTracer,
    consumer::{Connection, Connections, Growth},
};

/// Print which process talks to which address and port, with bytes and connections.
///
/// The command traces for `--duration`, or until Ctrl-C, and then prints one line for each process,
/// direction, address and port.
///
/// The direction is `out` if the process connected (TCP) or sent the first datagram (UDP). The port
/// is then the peer's. It is `in` if the process accepted the connection or received the first
/// datagram. The port is then its own. It is `?` if that is unknown, as for most connections that
/// are older than the trace, and the port is the peer's. In JSON: `outbound`, `inbound`, `null`.
///
/// Bytes are counted from the start of the trace. The bytes of an open connection are those of its
/// last sample, which is at most a second old. A UDP flow counts as one connection.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("format").args(["json", "dot"])))]
pub(crate) struct Args {
    /// How many seconds to trace.
    #[arg(long, value_name = "SECS", value_parser = crate::trace::seconds, default_value = "10")]
    duration: Duration,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Print a graph for Graphviz: `tcp-udp-trace depmap --dot | dot -Tsvg > map.svg`
    #[arg(long)]
    dot: bool,
    /// The most lines to print. One more line sums up the rest.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max: usize,
    /// Only sockets that pass this filter, such as "comm=nginx remote=10.0.0.0/8".
    #[arg(long, value_name = "FILTER", default_value = "")]
    filter: Filter,
}

const SECOND: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let tcp = TcpTracer::builder().filter(args.filter.clone());
    let mut tcp = tcp.sample_interval(SECOND).start().await?;
    let udp = UdpTracer::builder().filter(args.filter);
    let mut udp = udp.sample_interval(None).interval(SECOND).start().await?;
    let handles = vec![tcp.handle(), udp.handle()];
    crate::stop_at_signal(handles.clone())?;
    eprintln!("ready");
    tokio::spawn(async move {
        tokio::time::sleep(args.duration).await;
        for handle in handles {
            handle.stop();
        }
    });
    let mut map = Map::new(args.max);
    let mut events = stream::select(&mut tcp, &mut udp);
    while let Some(event) = events.next().await {
        map.count(&event);
    }
    drop(events);
    let mut stats = tcp.close().await?;
    stats += udp.close().await?;
    let report = map.report(stats);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else if args.dot {
        report.dot(&mut out)?;
    } else {
        report.text(&mut out)?;
    }
    eprintln!("stats: {}", serde_json::to_string(&report.stats)?);
    Ok(())
}

/// The key of a line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Edge {
    process: Option<Comm>,
    protocol: Protocol,
    direction: Option<Direction>,
    peer: IpAddr,
    port: u16,
}

impl Edge {
    fn of(connection: &Connection) -> Self {
        let socket = &connection.socket;
        let direction = connection.direction;
        Self {
            process: connection.process.as_ref().map(|process| process.comm),
            protocol: socket.protocol,
            direction,
            peer: socket.remote.ip(),
            port: match direction {
                Some(Direction::Inbound) => socket.local.port(),
                _ => socket.remote.port(),
            },
        }
    }
}

/// The sums of one edge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Sums {
    connections: u64,
    tx_bytes: u64,
    rx_bytes: u64,
}

/// Sums up the events by edge.
struct Map {
    edges: HashMap<Edge, Sums>,
    max: usize,
    /// The sums of all edges beyond `max`.
    other: Sums,
    growth: Growth,
    open: Connections,
}

impl Map {
    fn new(max: usize) -> Self {
        Self {
            edges: HashMap::new(),
            max,
            other: Sums::default(),
            growth: Growth::new(),
            open: Connections::new(),
        }
    }

    fn count(&mut self, event: &Event) {
        let added = self.growth.add(event).traffic;
        let ended = self.open.add(event);
        let connection = ended.as_ref().or_else(|| self.open.get(event));
        let Some(edge) = connection.map(Edge::of) else {
            return;
        };
        let connections = u64::from(ended.is_some());
        if connections + added.tx_bytes + added.rx_bytes > 0 {
            let sums = self.sums(edge);
            sums.connections += connections;
            sums.tx_bytes += added.tx_bytes;
            sums.rx_bytes += added.rx_bytes;
        }
    }

    fn sums(&mut self, edge: Edge) -> &mut Sums {
        if self.edges.len() < self.max || self.edges.contains_key(&edge) {
            self.edges.entry(edge).or_default()
        } else {
            &mut self.other
        }
    }

    /// Returns the report, the edges with the most bytes first.
    fn report(mut self, stats: Stats) -> Report {
        for edge in self.open.iter().map(Edge::of).collect::<Vec<_>>() {
            self.sums(edge).connections += 1;
        }
        let edges = self.edges.into_iter().map(|(edge, sums)| Line {
            process: edge.process.map(|comm| comm.to_string()),
            protocol: edge.protocol,
            direction: edge.direction,
            peer: edge.peer,
            port: edge.port,
            sums,
        });
        let mut edges: Vec<_> = edges.collect();
        edges.sort_by(|one, two| {
            let bytes = |line: &Line| line.sums.tx_bytes + line.sums.rx_bytes;
            let name = |line: &Line| (line.process.clone(), line.peer, line.port);
            bytes(two)
                .cmp(&bytes(one))
                .then_with(|| name(one).cmp(&name(two)))
        });
        Report {
            edges,
            other: self.other,
            stats,
        }
    }
}

/// The content of the output.
#[derive(Debug, Serialize)]
struct Report {
    edges: Vec<Line>,
    other: Sums,
    stats: Stats,
}

#[derive(Debug, Serialize)]
struct Line {
    process: Option<String>,
    protocol: Protocol,
    direction: Option<Direction>,
    peer: IpAddr,
    port: u16,
    #[serde(flatten)]
    sums: Sums,
}

impl Line {
    fn name(&self) -> &str {
        self.process.as_deref().unwrap_or("?")
    }
}

impl Report {
    fn text(&self, out: &mut impl Write) -> io::Result<()> {
        let widest = |name: &str, texts: &mut dyn Iterator<Item = String>| {
            texts
                .map(|text| text.chars().count())
                .max()
                .unwrap_or(0)
                .max(name.len())
        };
        let process = widest(
            "PROCESS",
            &mut self.edges.iter().map(|line| line.name().to_owned()),
        );
        let peer = widest(
            "PEER",
            &mut self.edges.iter().map(|line| line.peer.to_string()),
        );
        let mut row = |cells: [&str; 8]| {
            let [
                name,
                protocol,
                direction,
                address,
                port,
                connections,
                tx,
                rx,
            ] = cells;
            writeln!(
                out,
                "{name:process$} {protocol:5} {direction:3} {address:peer$} {port:>5} \
                 {connections:>11} {tx:>14} {rx:>14}"
            )
        };
        row([
            "PROCESS",
            "PROTO",
            "DIR",
            "PEER",
            "PORT",
            "CONNECTIONS",
            "TX_BYTES",
            "RX_BYTES",
        ])?;
        for line in &self.edges {
            let direction = match line.direction {
                Some(Direction::Outbound) => "out",
                Some(Direction::Inbound) => "in",
                _ => "?",
            };
            row([
                line.name(),
                &line.protocol.to_string(),
                direction,
                &line.peer.to_string(),
                &line.port.to_string(),
                &line.sums.connections.to_string(),
                &line.sums.tx_bytes.to_string(),
                &line.sums.rx_bytes.to_string(),
            ])?;
        }
        if self.other == Sums::default() {
            return Ok(());
        }
        let Sums {
            connections,
            tx_bytes,
            rx_bytes,
        } = self.other;
        let [connections, tx, rx] = [connections, tx_bytes, rx_bytes].map(|sum| sum.to_string());
        row(["(others)", "", "", "", "", &connections, &tx, &rx])
    }

    /// Writes a Graphviz graph. An arrow points from the side that opened the connection to the
    /// other side.
    fn dot(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "digraph \"tcp-udp-trace\" {{\n  rankdir=LR;\n  node [shape=ellipse];"
        )?;
        let mut names: Vec<_> = self.edges.iter().map(Line::name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            writeln!(out, "  {} [shape=box];", quoted(name))?;
        }
        for line in &self.edges {
            let name = quoted(line.name());
            let Sums {
                connections,
                tx_bytes,
                rx_bytes,
            } = line.sums;
            let label = format!(
                "{} {connections} x, tx {tx_bytes} B, rx {rx_bytes} B",
                line.protocol
            );
            let (from, to, label) = match line.direction {
                Some(Direction::Inbound) => {
                    let peer = quoted(&line.peer.to_string());
                    (peer, name, format!("port {} {label}", line.port))
                }
                _ => (
                    name,
                    quoted(&SocketAddr::new(line.peer, line.port).to_string()),
                    label,
                ),
            };
            let direction = match line.direction {
                None => ", dir=none",
                Some(_) => "",
            };
            writeln!(
                out,
                "  {from} -> {to} [label={}{direction}];",
                quoted(&label)
            )?;
        }
        writeln!(out, "}}")
    }
}

/// Returns the text as a quoted string of Graphviz.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Returns an event of a TCP socket, deserialized from JSON.
    fn tcp(id: u64, comm: &str, remote: &str, kind: serde_json::Value, bytes: u64) -> Event {
        let direction = if remote.contains("10.0.0.9") {
            "inbound"
        } else {
            "outbound"
        };
        serde_json::from_value(json!({
            "time": "2026-01-31T12:00:00Z", "uptime_ns": 0, "kind": kind,
            "process": {"pid": 1, "tid": 1, "uid": 0, "comm": comm, "origin": "creator",
                        "started_ns": 0},
            "socket": {"protocol": "tcp", "id": id, "cookie": null, "local": "10.0.0.1:443",
                       "remote": remote, "uid": 0, "netns": 0, "cgroup": 0, "age_ns": 0,
                       "older": false, "direction": direction},
            "traffic": {"tx_bytes": bytes, "rx_bytes": 0, "tx_packets": 1, "rx_packets": 1}
        }))
        .unwrap()
    }

    fn change(from: &str, to: &str) -> serde_json::Value {
        json!({"type": "state_change", "from": from, "to": to, "error": null})
    }

    fn report(max: usize, events: &[Event]) -> Report {
        let mut map = Map::new(max);
        events.iter().for_each(|event| map.count(event));
        map.report(Stats::default())
    }

    fn text(report: &Report) -> Vec<String> {
        let mut text = Vec::new();
        report.text(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        text.lines().skip(1).map(words).collect()
    }

    /// Returns the events of two connections to one server, each from its own client port. The
    /// process that accepts becomes the owner.
    fn served() -> Vec<Event> {
        let accept = || json!({"type": "accept"});
        let close = || change("LAST_ACK", "CLOSE");
        let open = || change("SYN_RECV", "ESTABLISHED");
        let mut events = Vec::new();
        for (id, remote) in [(1, "10.0.0.9:50001"), (2, "10.0.0.9:50002")] {
            events.push(tcp(id, "master", remote, open(), 0));
            events.push(tcp(id, "worker", remote, accept(), 0));
            events.push(tcp(id, "worker", remote, close(), 500));
        }
        events
    }

    #[test]
    fn clients_of_a_port_are_one_line() {
        let report = report(10, &served());
        assert_eq!(text(&report), ["worker tcp in 10.0.0.9 443 2 1000 0"]);
    }

    #[test]
    fn failed_attempt_is_no_connection() {
        let fails = [
            tcp(1, "curl", "10.0.0.2:80", change("CLOSE", "SYN_SENT"), 0),
            tcp(1, "curl", "10.0.0.2:80", change("SYN_SENT", "CLOSE"), 0),
        ];
        assert!(text(&report(10, &fails)).is_empty());
    }

    #[test]
    fn edges_beyond_the_maximum_are_summed_up() {
        let open = || change("SYN_SENT", "ESTABLISHED");
        let mut events = served();
        events.push(tcp(3, "curl", "10.0.0.2:80", open(), 0));
        events.push(tcp(
            3,
            "curl",
            "10.0.0.2:80",
            change("FIN_WAIT2", "CLOSE"),
            70,
        ));
        let lines = text(&report(1, &events));
        assert_eq!(
            lines,
            ["worker tcp in 10.0.0.9 443 2 1000 0", "(others) 1 70 0"]
        );
    }

    #[test]
    fn graph_has_quoted_names() {
        let open = change("SYN_SENT", "ESTABLISHED");
        let mut dot = Vec::new();
        let report = report(9, &[tcp(1, "a\"b", "[2001:db8::1]:80", open, 0)]);
        report.dot(&mut dot).unwrap();
        let dot = String::from_utf8(dot).unwrap();
        assert!(
            dot.contains(r#""a\"b" -> "[2001:db8::1]:80" [label="tcp 1 x,"#),
            "{dot}"
        );
    }
}
