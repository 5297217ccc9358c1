//! The subjects: processes that trace, measured from outside.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Seek as _, Write as _},
    iter::Sum,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use crate::{
    Options,
    child::{self, Report},
    until_still,
    workload::{Workload, keep_to, poke},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Subject {
    /// No tracer.
    Nothing,
    /// Ours, with the settings of [`child`].
    Ours(&'static str),
    /// A program of the floor.
    Floor(Protocol, &'static str, &'static str),
    /// Another tool.
    Peer(&'static Peer),
}

/// A tool of another project.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    name: &'static str,
    protocol: Protocol,
    program: &'static str,
    args: &'static [&'static str],
    /// How many lines it prints for a unit of traffic; 0 if it prints none for each.
    lines: u64,
    /// The number in each of these lines: the port, or our process id.
    has_port: bool,
}

const PEERS: &[Peer] = &[
    Peer {
        name: "tcpstates (libbpf-tools)",
        protocol: Protocol::Tcp,
        program: "tcpstates",
        args: &[],
        lines: 10,
        has_port: true,
    },
    Peer {
        name: "tcplife (libbpf-tools): closes only",
        protocol: Protocol::Tcp,
        program: "tcplife",
        args: &[],
        lines: 2,
        has_port: true,
    },
    Peer {
        name: "bpftrace: prints each state",
        protocol: Protocol::Tcp,
        program: "bpftrace",
        args: &[
            "-e",
            "tracepoint:sock:inet_sock_set_state /args->protocol == 6/ { printf(\"%llu %d %s %d %d %s %d %s %d\\n\", \
             nsecs, pid, comm, args->oldstate, args->newstate, ntop(args->saddr), args->sport, ntop(args->daddr), \
             args->dport); }",
        ],
        lines: 10,
        has_port: true,
    },
    Peer {
        name: "bpftrace: counts by socket",
        protocol: Protocol::Udp,
        program: "bpftrace",
        args: &[
            "-e",
            "tracepoint:sock:sock_send_length /args->protocol == 17/ { @n[args->sk] = count(); @b[args->sk] = sum(args->ret); }",
        ],
        lines: 0,
        has_port: false,
    },
    Peer {
        name: "bpftrace: prints each send",
        protocol: Protocol::Udp,
        program: "bpftrace",
        args: &[
            "-e",
            "tracepoint:sock:sock_send_length /args->protocol == 17/ { printf(\"%llu %d %s %llx %d\\n\", nsecs, pid, comm, \
             args->sk, args->ret); }",
        ],
        lines: 1,
        has_port: false,
    },
];

/// Returns the subjects of a workload. Prints which ones are skipped, because they are not
/// available here.
pub(crate) fn of(workload: &Workload, options: &Options) -> Vec<Subject> {
    let protocol = workload.protocol;
    let mut subjects = vec![Subject::Nothing];
    if workload.is_untraced {
        let defaults = workload.tracers().iter().copied().map(child::default);
        subjects.extend(defaults.map(Subject::Ours));
        return subjects;
    }
    subjects.extend(child::setups(protocol).map(Subject::Ours));
    for peer in PEERS.iter().filter(|peer| peer.protocol == protocol) {
        if find(peer.program).is_some() {
            subjects.push(Subject::Peer(peer));
        } else {
            println!(
                "skipped: {}: `{}` is not installed",
                peer.name, peer.program
            );
        }
    }
    let floor: &[_] = match protocol {
        Protocol::Tcp => &[
            ("tcp_empty", "floor: an empty program"),
            (
                "tcp_record",
                "floor: a record of 128 bytes, batched wake-ups",
            ),
        ],
        Protocol::Udp => &[
            ("udp_empty", "floor: an empty program"),
            ("udp_count", "floor: one hash update"),
            ("udp_count+udp_count_in", "floor: two hash updates"),
        ],
    };
    if options.floor.is_some() {
        let floor = floor.iter();
        subjects.extend(floor.map(|(program, name)| Subject::Floor(protocol, program, name)));
    } else {
        println!("skipped: the floor: no object was given (--floor)");
    }
    subjects
}

fn find(program: &str) -> Option<PathBuf> {
    let folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    folders
        .iter()
        .map(|folder| PathBuf::from(folder).join(program))
        .find(|path| path.exists())
}

impl Subject {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Nothing => "no tracer",
            Self::Ours(name) | Self::Floor(.., name) => name,
            Self::Peer(peer) => peer.name,
        }
    }

    /// Returns whether it reports only a part of the state changes.
    pub(crate) fn is_filtered(&self) -> bool {
        matches!(self, Self::Ours(setup) if child::truth(setup).is_some())
    }

    /// How many events it must report for each unit; 0 if it does not report them one by one.
    pub(crate) fn truth(&self, workload: &Workload) -> u64 {
        match self {
            Self::Peer(peer) => peer.lines,
            Self::Ours(setup) => child::truth(setup).unwrap_or(workload.events_each),
            _ => workload.events_each,
        }
    }
}

/// A subject that runs.
#[derive(Debug)]
pub(crate) struct Running {
    process: Option<Process>,
    /// From the start of the process until it was ready.
    pub(crate) ready: Duration,
}

#[derive(Debug)]
struct Process {
    child: Child,
    pid: Pid,
    voice: Voice,
}

/// The way in which a process reports its events.
#[derive(Debug)]
enum Voice {
    /// It answers queries.
    Answers(ChildStdin, BufReader<ChildStdout>),
    /// It prints lines to this file. The lines with the number of this kind in them count.
    Prints(File, &'static Peer),
}

impl Running {
    /// Starts a subject, and waits until it is ready: ours reports so, of others a program must
    /// have run.
    pub(crate) fn start(
        subject: &Subject,
        is_pinned: bool,
        options: &Options,
    ) -> anyhow::Result<Self> {
        if *subject == Subject::Nothing {
            return Ok(Self {
                process: None,
                ready: Duration::ZERO,
            });
        }
        let mut command = Command::new("/proc/self/exe");
        let printed = match subject {
            Subject::Peer(peer) => {
                let program = find(peer.program).context("the program is not there")?;
                command.arg(child::PEER).arg(program).args(peer.args);
                // The file has no name, and ends with this process.
                let file = tempfile()?;
                command
                    .stdin(Stdio::null())
                    .stdout(file.try_clone()?)
                    .stderr(Stdio::null());
                Some((file, *peer))
            }
            Subject::Floor(_, program, _) => {
                command.arg(child::FLOOR).arg(program).args(&options.floor);
                None
            }
            Subject::Ours(setup) => {
                command.arg(child::OURS).arg(setup);
                None
            }
            Subject::Nothing => None,
        };
        if printed.is_none() {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        }
        if is_pinned {
            keep_to(|cpu| cpu != 0)?;
        }
        let began = Instant::now();
        let spawned = command.spawn();
        keep_to(|_| true)?;
        let mut child = spawned.context("starting a subject")?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let voice = match printed {
            Some((file, peer)) => Voice::Prints(file, peer),
            None => Voice::Answers(
                child.stdin.take().unwrap(),
                BufReader::new(child.stdout.take().unwrap()),
            ),
        };
        let mut running = Self {
            process: Some(Process { child, pid, voice }),
            ready: Duration::ZERO,
        };
        running.await_ready()?;
        running.ready = began.elapsed();
        Ok(running)
    }

    fn await_ready(&mut self) -> anyhow::Result<()> {
        let process = self.process.as_mut().unwrap();
        match &mut process.voice {
            Voice::Answers(_, answers) => {
                let mut line = String::new();
                answers.read_line(&mut line)?;
                ensure!(line == child::READY, "the subject did not start");
            }
            Voice::Prints(_, peer) => {
                let protocol = peer.protocol;
                let _clock = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
                let deadline = Instant::now() + Duration::from_secs(30);
                while self.programs()?.runs == 0 {
                    ensure!(Instant::now() < deadline, "none of its programs has run");
                    poke(protocol)?;
                    thread::sleep(Duration::from_micros(200));
                }
            }
        }
        Ok(())
    }

    /// Waits until it has reported all its events.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        // Totals of UDP sockets come at their close. Gathered records come within 20 ms.
        const QUIET: Duration = Duration::from_millis(60);
        match &mut process.voice {
            Voice::Answers(queries, answers) => {
                until_still(QUIET, || Ok(query(queries, answers)?.events)).map(drop)
            }
            Voice::Prints(file, _) => until_still(QUIET, || Ok(file.metadata()?.len())).map(drop),
        }
    }

    /// Returns the current report.
    pub(crate) fn query(&mut self) -> anyhow::Result<Report> {
        match &mut self.process.as_mut().context("nothing runs")?.voice {
            Voice::Answers(queries, answers) => query(queries, answers),
            Voice::Prints(..) => Ok(Report::default()),
        }
    }

    /// Returns the times that the kernel has measured, of all its programs together.
    pub(crate) fn programs(&self) -> anyhow::Result<Programs> {
        let Some(Process { pid, .. }) = &self.process else {
            return Ok(Programs::default());
        };
        let mut programs = std::collections::BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed meanwhile.
            let info = fs::read_to_string(entry?.path()).unwrap_or_default();
            let number = |name| {
                let value = info.lines().find_map(|line| line.strip_prefix(name));
                value.and_then(|value| value.trim().parse::<u64>().ok())
            };
            if let (Some(id), Some(ns), Some(runs)) = (
                number("prog_id:"),
                number("run_time_ns:"),
                number("run_cnt:"),
            ) {
                programs.insert(
                    id,
                    Programs {
                        run_time: Duration::from_nanos(ns),
                        runs,
                    },
                );
            }
        }
        Ok(programs.into_values().sum())
    }

    pub(crate) fn cpu(&self) -> anyhow::Result<Cpu> {
        let Some(Process { pid, .. }) = &self.process else {
            return Ok(Cpu::default());
        };
        let total = Duration::from(clock_gettime(clock_getcpuclockid(*pid)?)?);
        // Fields 14 and 15, in hundredths of a second. The second field, in brackets, may contain
        // any bytes.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let rest = stat.rsplit_once(')').context("no name")?.1;
        let ticks: u32 = rest
            .split_whitespace()
            .nth(11)
            .context("no utime")?
            .parse()?;
        let user = Duration::from_millis(10) * ticks;
        Ok(Cpu { total, user })
    }

    /// Returns the kernel memory of its maps and programs, in bytes.
    pub(crate) fn kernel_memory(&self) -> anyhow::Result<u64> {
        let pid = self.process.as_ref().context("nothing runs")?.pid;
        let mut objects = std::collections::BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed meanwhile.
            let info = fs::read_to_string(entry?.path()).unwrap_or_default();
            let line = |name| info.lines().find(|line| line.starts_with(name));
            let object = line("map_id:").or_else(|| line("prog_id:"));
            if let (Some(object), Some(memory)) = (object, line("memlock:")) {
                let bytes = memory.rsplit('\t').next().context("no number")?;
                objects.insert(object.to_owned(), bytes.trim().parse::<u64>()?);
            }
        }
        Ok(objects.values().sum())
    }

    /// Returns how often it has gone to sleep by itself, all threads together. If it does not
    /// report that, only the current threads count.
    pub(crate) fn sleeps(&mut self) -> anyhow::Result<u64> {
        if let Some(sleeps) = self.query()?.sleeps {
            return Ok(sleeps);
        }
        let pid = self.process.as_ref().context("nothing runs")?.pid;
        let mut sleeps = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sleeps += line
                .and_then(|line| line.trim().parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(sleeps)
    }

    pub(crate) fn peak_rss_kb(&self) -> anyhow::Result<u64> {
        let Some(Process { pid, .. }) = &self.process else {
            return Ok(0);
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Stops and continues it, as `kill` does.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let process = self.process.as_ref().context("nothing runs")?;
        Ok(kill(process.pid, signal)?)
    }

    /// Ends it, and returns its last report.
    pub(crate) fn stop(mut self, port: u16) -> anyhow::Result<Report> {
        let Some(process) = &mut self.process else {
            return Ok(Report::default());
        };
        match &mut process.voice {
            Voice::Answers(queries, answers) => query(queries, answers),
            Voice::Prints(file, peer) => {
                // Some tools miss a signal now and then.
                let deadline = Instant::now() + Duration::from_secs(30);
                while process.child.try_wait()?.is_none() {
                    ensure!(Instant::now() < deadline, "the subject does not end");
                    kill(process.pid, Signal::SIGINT)?;
                    thread::sleep(Duration::from_millis(500));
                }
                let number = if peer.has_port {
                    port.into()
                } else {
                    std::process::id()
                };
                let number = number.to_string();
                file.rewind()?;
                let mut text = Vec::new();
                file.read_to_end(&mut text)?;
                let text = String::from_utf8_lossy(&text);
                let is_ours = |line: &&str| line.split_whitespace().any(|word| word == number);
                let seen = text.lines().filter(is_ours).count() as u64;
                Ok(Report {
                    seen: (peer.lines > 0).then_some(seen),
                    ..Report::default()
                })
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn query(queries: &mut ChildStdin, answers: &mut BufReader<ChildStdout>) -> anyhow::Result<Report> {
    queries.write_all(b"?\n")?;
    let mut line = String::new();
    answers.read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

fn tempfile() -> anyhow::Result<File> {
    let path = std::env::temp_dir().join(format!("tut-bench-{}", std::process::id()));
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// The times and runs of programs, by the kernel's clock.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Programs {
    pub(crate) run_time: Duration,
    pub(crate) runs: u64,
}

impl Programs {
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            run_time: self.run_time - before.run_time,
            runs: self.runs - before.runs,
        }
    }
}

impl Sum for Programs {
    fn sum<I: Iterator<Item = Self>>(programs: I) -> Self {
        programs.fold(Self::default(), |sum, program| Self {
            run_time: sum.run_time + program.run_time,
            runs: sum.runs + program.runs,
        })
    }
}

/// CPU time of a process.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cpu {
    pub(crate) total: Duration,
    /// To 10 ms.
    pub(crate) user: Duration,
}

impl Cpu {
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            total: self.total - before.total,
            user: self.user - before.user,
        }
    }
}
