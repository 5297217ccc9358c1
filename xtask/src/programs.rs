//! `cargo xtask programs`: compares the events of real programs with the counts of those programs.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    apt,
    process::{self, Ended},
    workspace,
};

/// Compare the events of nginx, Redis, PostgreSQL, iperf3 and dnsmasq with what these programs
/// count, as root.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The programs, in a Debian of their own.
const PACKAGES: &str = "nginx-light,apache2-utils,redis-server,redis-tools,postgresql-15,iperf3,\
                        dnsmasq-base,bind9-dnsutils";
/// The network namespace that the programs run in.
const NAMESPACE: &str = "tcp-udp-trace-programs";

/// The output of the server that runs.
const LOG: &str = "server.log";

/// How long a program may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn run(_: &Args) -> Result<()> {
    ensure!(
        process::is_root(),
        "the programs run in a namespace, which needs root"
    );
    let world = World::new()?;
    let mut table = Table::default();
    world.web(&mut table)?;
    world.redis(&mut table)?;
    world.postgres(&mut table)?;
    world.iperf(&mut table)?;
    world.dns(&mut table)?;
    table.finish()
}

/// Numbers of the events, and the same ones as a program counts them.
#[derive(Default)]
struct Table {
    differ: usize,
}

impl Table {
    fn compare(&mut self, what: &str, events: u64, program: u64) {
        let verdict = if events == program { "" } else { "  DIFFERENT" };
        println!("{what:<52} {events:>12} {program:>12}{verdict}");
        self.differ += usize::from(events != program);
    }

    /// The program counts what its processes wrote and read, and the connection was reset in
    /// between.
    fn compare_range(&mut self, what: &str, events: u64, (read, written): (u64, u64)) {
        self.compare(what, events, events.clamp(read, written));
    }

    fn finish(self) -> Result<()> {
        ensure!(self.differ == 0, "{} numbers are different", self.differ);
        Ok(())
    }
}

/// A network namespace with a loopback interface, and a Debian with the programs.
struct World {
    root: PathBuf,
    trace: PathBuf,
}

impl World {
    fn new() -> Result<Self> {
        let cache = workspace::cache_dir().join("programs");
        fs::create_dir_all(&cache).context("cannot create a folder")?;
        let archive = cache.join("programs.tar");
        apt::root_file_system(PACKAGES, &archive)?;
        let root = cache.join("root");
        workspace::recreate(&root)?;
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(&archive).arg("-C").arg(&root);
        process::stdout(&mut unpack)?;

        let mut build = Command::new(workspace::cargo());
        build.current_dir(workspace::root());
        build.args([
            "build",
            "--release",
            "--package",
            "tcp-udp-trace",
            "--all-features",
        ]);
        process::run(build.args(["--example", "trace"]))?;
        let trace = workspace::target_dir().join("release/examples/trace");

        // One that an interrupted run has left.
        let _ = process::stdout(Command::new("ip").args(["netns", "delete", NAMESPACE]));
        process::stdout(Command::new("ip").args(["netns", "add", NAMESPACE]))?;
        let world = Self { root, trace };
        let mut up = Command::new("ip");
        up.args(["-n", NAMESPACE, "link", "set", "lo", "up"]);
        process::stdout(&mut up)?;
        println!("{:<52} {:>12} {:>12}", "", "events", "program");
        Ok(world)
    }

    /// Returns a command that runs a program of the Debian in the namespace.
    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", NAMESPACE, "chroot"]);
        command.arg(&self.root).args(line);
        command
    }

    /// Runs a client, and returns its output.
    fn client(&self, line: &[&str]) -> Result<String> {
        process::stdout(&mut self.command(line))
    }

    /// Starts a server that is ready when it has a socket at this port.
    fn server(&self, line: &[&str], port: u16) -> Result<Ended> {
        let mut command = self.command(line);
        let output = File::create(self.root.join(LOG)).context("cannot create a log")?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?);
        let mut server = Ended(command.stderr(output).spawn()?);
        let until = Instant::now() + PATIENCE;
        loop {
            let mut sockets = Command::new("ip");
            sockets.args(["netns", "exec", NAMESPACE, "ss", "-Hltun"]);
            if process::stdout(&mut sockets)?.contains(&format!(":{port} ")) {
                return Ok(server);
            }
            if server.0.try_wait()?.is_some() || Instant::now() > until {
                bail!("`{}` does not listen: {}", line.join(" "), self.log()?);
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Returns the output of the last server.
    fn log(&self) -> Result<String> {
        fs::read_to_string(self.root.join(LOG)).context("cannot read a log")
    }

    /// Waits until the output of the last server has this text.
    fn wait_for_log(&self, text: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.log()?.contains(text) {
            ensure!(Instant::now() < until, "no `{text}`: {}", self.log()?);
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Returns the events of what `act` does. No event may be lost.
    fn events<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<(Vec<Value>, T)> {
        let inode = fs::metadata(format!("/run/netns/{NAMESPACE}"))?.ino();
        let file = self.root.join("events.ndjson");
        let mut command = Command::new(&self.trace);
        command.args(["--json", "--sample", "off", "--queue", "200000", "--filter"]);
        command.arg(format!("netns={inode}"));
        command.stdout(File::create(&file)?).stderr(Stdio::piped());
        let mut tracer = Ended(command.spawn()?);
        let stderr = tracer.0.stderr.take().context("no stderr")?;
        let lines = process::lines(stderr, |_| {});
        process::wait_for_line(&lines, PATIENCE, |line| line.starts_with("ready:"))
            .context("the tracer does not start")?;
        let result = act()?;
        let pid = tracer.0.id().to_string();
        process::stdout(Command::new("kill").args(["-INT", &pid]))?;
        tracer.0.wait()?;
        let stats = lines.iter().find_map(|line| {
            let stats = line.strip_prefix("stats: ")?;
            serde_json::from_str::<Value>(stats).ok()
        });
        let stats = stats.context("the tracer shows no statistics")?;
        for lost in ["ring_lost", "queue_shed", "missed", "untracked"] {
            ensure!(stats[lost].as_u64() == Some(0), "{lost}: {stats}");
        }
        let events = fs::read_to_string(&file)?;
        let events = events.lines().map(serde_json::from_str);
        Ok((events.collect::<Result<_, _>>()?, result))
    }

    fn web(&self, table: &mut Table) -> Result<()> {
        const PORT: u16 = 8080;
        let configuration = "daemon off; master_process off; pid /tmp/nginx.pid;
            error_log /tmp/nginx.log;
            events {}
            http { access_log off; server { listen 127.0.0.1:8080; root /srv; } }";
        fs::write(self.root.join("etc/nginx/nginx.conf"), configuration)?;
        fs::write(self.root.join("srv/page"), vec![b'x'; 5_000])?;
        let (events, output) = self.events(|| {
            let _server = self.server(&["nginx"], PORT)?;
            let address = format!("http://127.0.0.1:{PORT}/page");
            self.client(&["ab", "-n", "2000", "-c", "16", &address])
        })?;
        let number = |name: &str| number_after(&output, name);
        let failed = number("Failed requests:")?;
        ensure!(failed == 0, "{output}");
        let mut clients = ends(&events, "outbound", "remote", PORT);
        let mut servers = ends(&events, "inbound", "local", PORT);
        // In the end, `ab` has connections on which it sends no request any more.
        clients.retain(|end| end["traffic"]["rx_bytes"] != 0);
        servers.retain(|end| end["traffic"]["tx_bytes"] != 0);
        let requests = number("Complete requests:")?;
        let bytes = number("Total transferred:")?;
        table.compare(
            "nginx: connections with an answer",
            servers.len() as u64,
            requests,
        );
        table.compare(
            "ab: connections with an answer",
            clients.len() as u64,
            requests,
        );
        table.compare("nginx: bytes sent", sum(&servers, "tx_bytes"), bytes);
        table.compare("ab: bytes received", sum(&clients, "rx_bytes"), bytes);
        Ok(())
    }

    fn redis(&self, table: &mut Table) -> Result<()> {
        const PORT: u16 = 6380;
        let (events, statistics) = self.events(|| {
            let line = [
                "redis-server",
                "--port",
                "6380",
                "--bind",
                "127.0.0.1",
                "--save",
                "",
            ];
            let _server = self.server(&line, PORT)?;
            let line = "redis-benchmark -p 6380 -n 5000 -c 20 -d 100 -t set,get -q";
            self.client(&line.split(' ').collect::<Vec<_>>())?;
            self.client(&["redis-cli", "-p", "6380", "info", "stats"])
        })?;
        let number = |name: &str| number_after(&statistics, name);
        let mut servers = ends(&events, "inbound", "local", PORT);
        let connections = number("total_connections_received:")?;
        table.compare(
            "redis: connections accepted",
            servers.len() as u64,
            connections,
        );
        let received = number("total_net_input_bytes:")?;
        table.compare("redis: bytes received", sum(&servers, "rx_bytes"), received);
        // The server has counted before it sent the statistics themselves.
        servers.sort_by_key(|end| {
            let age = end["socket"]["age_ns"].as_u64();
            end["uptime_ns"]
                .as_u64()
                .zip(age)
                .map(|(now, age)| now - age)
        });
        servers.pop();
        let sent = number("total_net_output_bytes:")?;
        table.compare("redis: bytes sent", sum(&servers, "tx_bytes"), sent);
        Ok(())
    }

    fn postgres(&self, table: &mut Table) -> Result<()> {
        const PORT: u16 = 5433;
        const TRANSACTIONS: u64 = 200;
        let trust = "host all all 127.0.0.1/32 trust\n";
        fs::write(self.root.join("etc/postgresql/15/main/pg_hba.conf"), trust)?;
        // The server refuses to run as root.
        let line = |line: &str| {
            let line = format!(
                "setpriv --reuid=postgres --regid=postgres --clear-groups \
                 /usr/lib/postgresql/15/bin/{line} -p {PORT}"
            );
            line.split(' ').map(str::to_owned).collect::<Vec<_>>()
        };
        let server = line(
            "postgres -D /var/lib/postgresql/15/main \
             -c config_file=/etc/postgresql/15/main/postgresql.conf -c listen_addresses=127.0.0.1 \
             -c unix_socket_directories= -c log_connections=on -c ssl=off \
             -c dynamic_shared_memory_type=mmap",
        );
        let client = |options: &str| {
            let line = line(&format!(
                "pgbench -h 127.0.0.1 -U postgres {options} postgres"
            ));
            self.client(&line.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let (events, (output, log)) = self.events(|| {
            let server: Vec<_> = server.iter().map(String::as_str).collect();
            let _server = self.server(&server, PORT)?;
            self.wait_for_log("ready to accept connections")?;
            client("-i -q")?;
            // Each transaction has a connection of its own.
            let output = client("-C -c 4 -j 2 -t 50")?;
            Ok((output, self.log()?))
        })?;
        let number = |name: &str| number_after(&output, name);
        ensure!(number("number of failed transactions:")? == 0, "{output}");
        let transactions = number("number of transactions actually processed:")?;
        ensure!(transactions == TRANSACTIONS, "{output}");
        let accepted = log.matches("connection received:").count() as u64;
        let servers = ends(&events, "inbound", "local", PORT);
        let clients = ends(&events, "outbound", "remote", PORT);
        table.compare("postgres: connections", servers.len() as u64, accepted);
        // One more fills the tables, and one reads their sizes.
        let connections = clients.len() as u64;
        table.compare("pgbench: connections", connections, transactions + 2);
        table.compare(
            "pgbench: bytes received, and sent by postgres",
            sum(&clients, "rx_bytes"),
            sum(&servers, "tx_bytes"),
        );
        Ok(())
    }

    fn iperf(&self, table: &mut Table) -> Result<()> {
        // The bytes that iperf3 sends before each stream of TCP, and before one of UDP.
        const COOKIE: u64 = 37;
        const HELLO: u64 = 4;
        let run = |port: u16, client: &str| {
            self.events(|| {
                let port_text = port.to_string();
                let _server = self.server(&["iperf3", "-s", "-1", "-J", "-p", &port_text], port)?;
                let line = format!("iperf3 -c 127.0.0.1 -p {port} -J {client}");
                let output = self.client(&line.split(' ').collect::<Vec<_>>())?;
                serde_json::from_str::<Value>(&output).context("not JSON")
            })
        };
        let (events, report) = run(5201, "-n 100M")?;
        let clients = ends(&events, "outbound", "remote", 5201);
        let bytes = |end: &&&Value| end["traffic"]["tx_bytes"].as_u64();
        let stream = clients.iter().max_by_key(bytes).context("no stream")?;
        let sent = &report["end"]["sum_sent"];
        let number = |value: &Value| value.as_u64().context("no number in the report");
        table.compare("iperf3: connections", clients.len() as u64, 2);
        let received = number(&report["end"]["sum_received"]["bytes"])?;
        table.compare_range(
            "iperf3: bytes by TCP",
            number(&stream["traffic"]["tx_bytes"])?,
            (received + COOKIE, number(&sent["bytes"])? + COOKIE),
        );
        table.compare(
            "iperf3: segments retransmitted",
            number(&stream["kind"]["summary"]["retransmitted_packets"])?,
            number(&sent["retransmits"])?,
        );
        let (events, refused) = self.events(|| {
            let line = ["iperf3", "-c", "127.0.0.1", "-p", "5299"];
            Ok(self.command(&line).output()?)
        })?;
        let refused = String::from_utf8_lossy(&refused.stderr).contains("Connection refused");
        let mut failed = ends(&events, "outbound", "remote", 5299);
        failed.retain(|end| end["kind"]["error"] == 111);
        let failed = failed.len() as u64;
        table.compare("iperf3: refused connections", failed, refused.into());
        let (events, report) = run(5202, "-u -b 200M -n 20M -l 1400 --get-server-output")?;
        let counted = &report["end"]["streams"][0]["udp"];
        let datagrams = number(&counted["packets"])?;
        // The client also counts those that had not arrived when the server stopped.
        let arrived = &report["server_output_json"]["end"]["streams"][0]["udp"];
        let received = number(&arrived["packets"])? - number(&arrived["lost_packets"])?;
        let clients = flows(&events, "remote", 5202);
        let servers = flows(&events, "local", 5202);
        table.compare(
            "iperf3: datagrams sent",
            sum(&clients, "tx_packets"),
            datagrams + 1,
        );
        table.compare(
            "iperf3: bytes sent by UDP",
            sum(&clients, "tx_bytes"),
            number(&counted["bytes"])? + HELLO,
        );
        table.compare(
            "iperf3: datagrams received",
            sum(&servers, "rx_packets"),
            received + 1,
        );
        Ok(())
    }

    fn dns(&self, table: &mut Table) -> Result<()> {
        const PORT: u16 = 5353;
        const QUERIES: u64 = 20;
        let server = "dnsmasq --keep-in-foreground --conf-file=/dev/null --pid-file= --user=root \
                      --port=5353 --listen-address=127.0.0.1 --bind-interfaces --no-resolv \
                      --no-hosts --address=/example.test/192.0.2.1";
        let (events, sizes) = self.events(|| {
            let _server = self.server(&server.split(' ').collect::<Vec<_>>(), PORT)?;
            let mut sizes = 0;
            for _ in 0..QUERIES {
                let line = ["dig", "@127.0.0.1", "-p", "5353", "example.test"];
                let answer = self.client(&line)?;
                ensure!(answer.contains("192.0.2.1"), "{answer}");
                sizes += number_after(&answer, "MSG SIZE  rcvd:")?;
            }
            Ok(sizes)
        })?;
        let (clients, servers) = (
            flows(&events, "remote", PORT),
            flows(&events, "local", PORT),
        );
        table.compare("dig: sockets", clients.len() as u64, QUERIES);
        table.compare(
            "dig: answers received",
            sum(&clients, "rx_packets"),
            QUERIES,
        );
        table.compare("dig: bytes received", sum(&clients, "rx_bytes"), sizes);
        table.compare(
            "dnsmasq: answers sent",
            sum(&servers, "tx_packets"),
            QUERIES,
        );
        table.compare("dnsmasq: bytes sent", sum(&servers, "tx_bytes"), sizes);
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // If this fails, the next run removes it.
        let _ = process::stdout(Command::new("ip").args(["netns", "delete", NAMESPACE]));
    }
}

/// Returns the number that follows a name in the output of a program.
fn number_after(output: &str, name: &str) -> Result<u64> {
    let rest = output.split_once(name).map(|(_, rest)| rest.trim_start());
    let number = rest.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    let number = number.and_then(|number| number.parse().ok());
    number.with_context(|| format!("no {name} in {output}"))
}

/// Returns whether one of the ends of an event's socket, `local` or `remote`, is at a port.
fn is_at(event: &Value, end: &str, port: u16) -> bool {
    let address = event["socket"][end].as_str().unwrap_or_default();
    address.ends_with(&format!(":{port}"))
}

/// Returns the ends of connections of a direction.
fn ends<'a>(events: &'a [Value], direction: &str, end: &str, port: u16) -> Vec<&'a Value> {
    let is_it = |event: &&Value| {
        event["kind"]["type"] == "state_change"
            && event["kind"]["to"] == "CLOSE"
            && event["socket"]["direction"] == direction
            && is_at(event, end, port)
    };
    events.iter().filter(is_it).collect()
}

/// Returns the last reports of flows.
fn flows<'a>(events: &'a [Value], end: &str, port: u16) -> Vec<&'a Value> {
    let is_it = |event: &&Value| event["kind"]["last"] == true && is_at(event, end, port);
    events.iter().filter(is_it).collect()
}

/// Returns the sum of a number in `traffic`.
fn sum(events: &[&Value], name: &str) -> u64 {
    let numbers = events.iter().map(|event| event["traffic"][name].as_u64());
    numbers.flatten().sum()
}
