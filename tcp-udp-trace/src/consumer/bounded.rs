//! A map of sockets and flows with a bounded number of entries.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use crate::event::{Event, Protocol};

/// Names a socket, or one life of a UDP flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    is_udp: bool,
    socket: u64,
    /// The peer of a flow, and the time of its first datagram. A socket may have several flows with
    /// one peer, and a flow may begin again after its end.
    flow: Option<(SocketAddr, Duration)>,
}

impl Key {
    /// The least of all keys.
    pub(super) const LEAST: Self = Self {
        is_udp: false,
        socket: 0,
        flow: None,
    };

    /// Returns the key of the event's socket.
    pub(super) fn of_socket(event: &Event) -> Self {
        Self {
            is_udp: event.socket.protocol == Protocol::Udp,
            socket: event.socket.id,
            flow: None,
        }
    }

    /// Returns the key of the event's flow, which has this age.
    pub(super) fn of_flow(event: &Event, age: Duration) -> Self {
        Self {
            flow: Some((event.socket.remote, event.uptime.saturating_sub(age))),
            ..Self::of_socket(event)
        }
    }

    /// Returns whether both are of one socket.
    pub(super) fn has_socket_of(self, other: Self) -> bool {
        (self.is_udp, self.socket) == (other.is_udp, other.socket)
    }
}

/// A map that forgets the least recently used entry when it is full.
#[derive(Debug)]
pub(super) struct Bounded<V> {
    capacity: usize,
    /// Each value, with its key in `order`.
    entries: BTreeMap<Key, (u64, V)>,
    order: BTreeMap<u64, Key>,
    uses: u64,
}

impl<V> Bounded<V> {
    /// Makes an empty map for this many entries, at least one.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            entries: BTreeMap::new(),
            order: BTreeMap::new(),
            uses: 0,
        }
    }

    pub(super) fn get(&self, key: Key) -> Option<&V> {
        self.entries.get(&key).map(|(_, value)| value)
    }

    /// Returns the value, which is not used by that.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut V> {
        self.entries.get_mut(&key).map(|(_, value)| value)
    }

    /// Returns the value, which is then the most recently used one.
    pub(super) fn touch(&mut self, key: Key) -> Option<&mut V> {
        let (used, value) = self.entries.get_mut(&key)?;
        self.order.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.order.insert(self.uses, key);
        Some(value)
    }

    /// Adds a value. Returns the entry that made room.
    pub(super) fn insert(&mut self, key: Key, value: V) -> Option<(Key, V)> {
        if let Some(known) = self.touch(key) {
            *known = value;
            return None;
        }
        let oldest = self.order.first_key_value().map(|(_, &key)| key);
        let evicted = oldest
            .filter(|_| self.entries.len() >= self.capacity)
            .and_then(|key| self.remove(key).map(|value| (key, value)));
        self.uses += 1;
        self.order.insert(self.uses, key);
        self.entries.insert(key, (self.uses, value));
        evicted
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<V> {
        let (used, value) = self.entries.remove(&key)?;
        self.order.remove(&used);
        Some(value)
    }

    /// Returns one of the flows of a socket.
    pub(super) fn a_flow_of(&self, socket: Key) -> Option<Key> {
        let mut flows = self.entries.range(socket..).map(|(&key, _)| key);
        flows
            .find(|key| key.flow.is_some() || !key.has_socket_of(socket))
            .filter(|key| key.has_socket_of(socket))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &V)> {
        self.entries.iter().map(|(&key, (_, value))| (key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(socket: u64, flow: Option<u64>) -> Key {
        let peer = SocketAddr::from(([127, 0, 0, 1], 53));
        Key {
            is_udp: true,
            socket,
            flow: flow.map(|born| (peer, Duration::from_nanos(born))),
        }
    }

    #[test]
    fn the_least_recently_used_makes_room() {
        let mut map = Bounded::new(2);
        assert_eq!(map.insert(key(1, None), 'a'), None);
        assert_eq!(map.insert(key(2, None), 'b'), None);
        assert_eq!(map.touch(key(1, None)), Some(&mut 'a'));
        assert_eq!(map.insert(key(3, None), 'c'), Some((key(2, None), 'b')));
        assert_eq!(map.insert(key(3, None), 'd'), None, "it is there already");
        assert_eq!(map.remove(key(1, None)), Some('a'));
        assert_eq!((map.len(), map.order.len()), (1, 1));
    }

    #[test]
    fn flows_of_a_socket() {
        let mut map = Bounded::new(9);
        for (socket, flow) in [(1, None), (2, None), (2, Some(7)), (2, Some(8)), (3, None)] {
            map.insert(key(socket, flow), ());
        }
        assert_eq!(map.a_flow_of(key(2, None)), Some(key(2, Some(7))));
        map.remove(key(2, Some(7)));
        assert_eq!(map.a_flow_of(key(2, None)), Some(key(2, Some(8))));
        assert_eq!(map.a_flow_of(key(1, None)), None);
        assert_eq!(map.a_flow_of(key(9, None)), None);
    }
}
