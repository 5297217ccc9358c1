//! Payload bytes: exact to the byte on every close, whatever the path did to the packets.

use integration_tests::{netns::tc, scene::Scene, suite::Test};
use nix::errno::Errno;
use tcp_udp_trace::TcpState::{Close, Established, Listen, SynRecv, SynSent};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            nothing_and_one_byte,
            veth_between_namespaces,
            veth_with_loss_and_delay,
            veth_with_local_drops,
            unread_bytes_count_as_received,
        ],
    ]
}

const MIB: u64 = 1 << 20;

fn nothing_and_one_byte() -> anyhow::Result<()> {
    for (up, down) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let scene = Scene::new()?;
        scene.check_transfer(up, down)?;
    }
    Ok(())
}

/// Nothing of the loopback's synchrony: transitions run in softirqs of other tasks.
fn veth_between_namespaces() -> anyhow::Result<()> {
    let (scene, _far) = Scene::over_veth()?;
    scene.check_transfer(MIB, MIB)
}

/// Retransmissions are not payload.
fn veth_with_loss_and_delay() -> anyhow::Result<()> {
    let (scene, far) = Scene::over_veth()?;
    tc("qdisc add dev near0 root netem loss 5% delay 5ms")?;
    far.run(|| tc("qdisc add dev far0 root netem loss 5% delay 5ms"))?;
    scene.check_transfer(MIB, MIB)
}

/// Segments that never left this machine's queue are not payload sent twice.
fn veth_with_local_drops() -> anyhow::Result<()> {
    let (scene, far) = Scene::over_veth()?;
    const QDISC: &str = "root tbf rate 20mbit burst 4kb limit 8kb";
    tc(&format!("qdisc add dev near0 {QDISC}"))?;
    far.run(|| tc(&format!("qdisc add dev far0 {QDISC}")))?;
    scene.check_transfer(MIB, MIB)
}

/// Bytes that the peer's kernel acknowledged and its application never read: they were sent and received, and closing
/// over them is a reset.
fn unread_bytes_count_as_received() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let connection = scene.connect()?;
    scene.client.send(&connection.client, 5_000)?;
    scene.server.receive(&connection.server, 1)?;
    scene.server.close(&connection.server)?;
    let client = scene
        .client_life(&connection, &[Close, SynSent, Established, Close])?
        .bytes(5_000, 0);
    let server = scene
        .server_life(&connection, &[Listen, SynRecv, Established, Close])?
        .bytes(0, 5_000);
    scene.finish(&[client.error(Errno::ECONNRESET as i32), server])
}
