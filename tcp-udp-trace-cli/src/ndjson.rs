//! The command `ndjson`: writes the events of the machine to a file, one JSON object per line, and
//! rotates the file when it is full.
//!
//! The program writes to `FILE`. A full `FILE` is renamed to `FILE.1`, `FILE.1` to `FILE.2`, and so
//! on. A line is never split over two files. When the program ends, the file has all events from
//! before SIGTERM or Ctrl-C.
//!
//! ```text
//! tcp-udp-trace ndjson events.ndjson --max-bytes 100000000 --keep 5
//! ```

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    num::NonZeroU32,
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use tcp_udp_trace::{Event, Filter, TcpTracer, UdpTracer, consumer::merge};

/// Write the socket events of the machine to a file, as JSON lines.
///
/// Needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to append to.
    file: PathBuf,
    /// The largest size of the file in bytes. Only a single line that is longer may exceed it.
    #[arg(long, value_name = "N", default_value_t = 100_000_000)]
    max_bytes: u64,
    /// How many full files to keep.
    #[arg(long, value_name = "N", default_value = "5")]
    keep: NonZeroU32,
    /// Only events that pass this filter, such as "comm=nginx kind=state_change,accept".
    #[arg(long, default_value = "")]
    filter: Filter,
}

/// The most events that are written before the file is flushed.
const BATCH: usize = 1024;

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let mut log = Log::open(args.file, args.max_bytes, args.keep.get())?;
    let tcp = TcpTracer::builder().filter(args.filter.clone());
    let mut tcp = tcp.start().await?;
    let mut udp = UdpTracer::builder().filter(args.filter).start().await?;
    crate::stop_at_signal(vec![tcp.handle(), udp.handle()])?;
    eprintln!("ready");
    let mut batches = merge(&mut tcp, &mut udp).ready_chunks(BATCH);
    while let Some(events) = batches.next().await {
        // Writing blocks the thread. Events wait in the queues meanwhile, and the tracers count
        // those that a full queue sheds.
        for event in &events {
            log.write(event)?;
        }
        log.flush()?;
    }
    drop(batches);
    let mut stats = tcp.close().await?;
    stats += udp.close().await?;
    eprintln!("stats: {}", serde_json::to_string(&stats)?);
    Ok(())
}

/// Returns whether the file has only whole lines. An earlier writer may have been killed in the
/// middle of a line.
fn ends_a_line(file: &File) -> io::Result<bool> {
    let mut last = [b'\n'];
    if let Some(end) = file.metadata()?.len().checked_sub(1) {
        file.read_exact_at(&mut last, end)?;
    }
    Ok(last == [b'\n'])
}

/// A file of lines that is rotated before it becomes too large.
struct Log {
    path: PathBuf,
    max_bytes: u64,
    keep: u32,
    file: BufWriter<File>,
    size: u64,
    /// A buffer that is reused for each line.
    line: Vec<u8>,
}

impl Log {
    fn open(path: PathBuf, max_bytes: u64, keep: u32) -> anyhow::Result<Self> {
        let mut options = File::options();
        let file = options.read(true).append(true).create(true).open(&path);
        let mut file = file.with_context(|| path.display().to_string())?;
        if !ends_a_line(&file)? {
            file.write_all(b"\n")?;
        }
        let size = file.metadata()?.len();
        Ok(Self {
            path,
            max_bytes,
            keep,
            file: BufWriter::new(file),
            size,
            line: Vec::new(),
        })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, event)?;
        self.line.push(b'\n');
        let length = self.line.len() as u64;
        if self.size > 0 && self.size + length > self.max_bytes {
            self.rotate()?;
        }
        self.size += length;
        self.file.write_all(&self.line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.flush()?;
        for older in (1..self.keep).rev() {
            match fs::rename(self.number(older), self.number(older + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, self.number(1))?;
        self.file = BufWriter::new(File::create_new(&self.path)?);
        self.size = 0;
        Ok(())
    }

    /// Returns the path `FILE.NUMBER`.
    fn number(&self, number: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{number}"));
        path.into()
    }
}
