//! Filters that choose one of so many sockets: whole lives are reported, or nothing.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Endpoint},
    collector::Collector,
    suite::Test,
    tcp_pair::loopback,
};
use tcp_udp_trace::{Event, Filter};

use crate::{
    compared::described,
    filters::{bind_udp, connect, receive, send},
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            of_tcp,
            of_udp,
        ],
    ]
}

const SOCKETS: usize = 120;
const ONE_IN: u32 = 3;

fn of_tcp() -> anyhow::Result<()> {
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    let listener = server.listen(loopback(false))?;
    let start = || Collector::start_with(|builder| builder.sample_interval(None));
    let collectors = [start()?, start()?];
    collectors[0].set_filter(Filter::new().one_in(ONE_IN))?;
    for _ in 0..SOCKETS / 2 {
        connect(&mut client, &listener, &mut server)?;
    }
    whole_lives(collectors)
}

fn of_udp() -> anyhow::Result<()> {
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    let to = bind_udp(&mut server, loopback(false))?;
    // Flows are reported once an hour, so each is reported at its first datagram and at its end.
    let start = || {
        Collector::start_udp_with(|builder| {
            let builder = builder.sample_interval(None);
            builder.interval(Duration::from_secs(3600))
        })
    };
    let collectors = [start()?, start()?];
    collectors[0].set_filter(Filter::new().one_in(ONE_IN))?;
    for _ in 0..SOCKETS {
        talk(&mut client, &to, &mut server)?;
    }
    whole_lives(collectors)
}

fn talk(client: &mut Actor, to: &Endpoint, server: &mut Actor) -> anyhow::Result<()> {
    let from = bind_udp(client, loopback(false))?;
    // The second datagram is in the flow's last report only.
    for size in [1, 22] {
        client.run(send(&from, to.local, &[size]))?;
        server.run(receive(to, 1))?;
    }
    client.close(&from)
}

/// Each socket has all its events or none, and about one in three has them.
fn whole_lives([filtered, reference]: [Collector; 2]) -> anyhow::Result<()> {
    reference.wait_closed(SOCKETS)?;
    let mut lives = lives(&reference.finish_all()?);
    ensure!(lives.len() == SOCKETS, "{} sockets", lives.len());
    let stats = filtered.handle().stats();
    ensure!(stats.kernel_filtered > 0, "{stats:?}");
    let chosen = self::lives(&filtered.finish_all()?);
    // Five times the standard deviation of 120 draws.
    ensure!((15..=65).contains(&chosen.len()), "{} chosen", chosen.len());
    for life in chosen {
        // Each tracer gives a socket another id.
        let same = lives.iter().position(|other| *other == life);
        let same = same.with_context(|| format!("no such socket: {life:#?}"))?;
        lives.swap_remove(same);
    }
    Ok(())
}

/// Returns the events of each socket that was closed. Later sockets may have the same ports.
fn lives(events: &[Event]) -> Vec<BTreeMap<String, usize>> {
    let mut sockets = HashMap::<_, Vec<_>>::new();
    for event in events {
        let events = sockets.entry(event.socket.id).or_default();
        events.push(event.clone());
    }
    sockets.retain(|_, events| events.iter().any(Event::is_close));
    sockets
        .into_values()
        .map(|events| described(&events))
        .collect()
}
