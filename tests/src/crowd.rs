//! Many short connections at once, as a load generator makes them.

use std::{fs, path::Path, process};

use anyhow::{Context as _, ensure};

use crate::{
    actor::{Actor, Command},
    suite::skip,
    tcp_pair::loopback,
};

/// Makes `clients` × `each` connections to one server over loopback in the namespace of the calling
/// thread.
pub fn connect(clients: u32, each: u32) -> anyhow::Result<()> {
    remember_closed_connections()?;
    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    server.begin(&Command::Serve(listener.fd, clients * each))?;
    let mut actors = Vec::new();
    for seed in 0..clients.into() {
        let mut client = Actor::spawn("client")?;
        client.begin(&Command::Churn {
            to: listener.local,
            connections: each,
            seed,
        })?;
        actors.push(client);
    }
    for client in &mut actors {
        ensure!(client.finish_exchanges()?.len() == each as usize);
    }
    server.finish_exchanges()?;
    server.close(&listener)
}

/// Keeps closed connections in `TIME_WAIT` in the namespace of the calling thread.
///
/// A small machine has room for a few thousand of them. Beyond that, the kernel drops them, and
/// answers the peer's FIN with a reset, which a tracer rightly reports.
pub fn remember_closed_connections() -> anyhow::Result<()> {
    Ok(fs::write(
        "/proc/sys/net/ipv4/tcp_max_tw_buckets",
        "262144",
    )?)
}

/// Runs `ab -n 5000 -c 10` against nginx in the namespace of the calling thread.
pub fn apache_bench() -> anyhow::Result<()> {
    const PORT: u16 = 8099;
    let [nginx, ab] = ["/usr/sbin/nginx", "/usr/bin/ab"];
    if !(Path::new(nginx).exists() && Path::new(ab).exists()) {
        return skip("nginx or ab is not installed (Debian: nginx-light, apache2-utils)");
    }
    let folder = std::env::temp_dir().join(format!("tcp-udp-trace-nginx-{}", process::id()));
    fs::create_dir_all(&folder)?;
    let config = folder.join("nginx.conf");
    let pid = folder.join("pid");
    fs::write(
        &config,
        format!(
            "daemon off; master_process off; pid {}; error_log stderr;
             events {{ worker_connections 64; }}
             http {{ access_log off; server {{ listen 127.0.0.1:{PORT};
             location / {{ return 200 'hello'; }} }} }}",
            pid.display()
        ),
    )?;
    let mut server = process::Command::new(nginx)
        .arg("-c")
        .arg(&config)
        .spawn()?;
    let result = (|| {
        // `ab` does not retry, so it starts after nginx listens.
        while std::net::TcpStream::connect(("127.0.0.1", PORT)).is_err() {
            ensure!(server.try_wait()?.is_none(), "nginx has ended");
            std::thread::yield_now();
        }
        let url = format!("http://127.0.0.1:{PORT}/");
        let ab = process::Command::new(ab)
            .args(["-q", "-n", "5000", "-c", "10", &url])
            .output()?;
        let report = String::from_utf8_lossy(&ab.stdout);
        let complete = report
            .lines()
            .find_map(|line| line.strip_prefix("Complete requests:"))
            .context("ab reports nothing")?;
        ensure!(complete.trim() == "5000", "{report}");
        Ok(())
    })();
    server.kill()?;
    server.wait()?;
    fs::remove_dir_all(&folder)?;
    result
}
