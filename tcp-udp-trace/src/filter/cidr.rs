//! Networks of addresses.

use std::{
    fmt::{self, Display},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use tcp_udp_trace_common::{AF_INET, AF_INET6, filter::Network};

/// A network, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cidr {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

/// A network of local or of remote addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SidedCidr {
    pub(super) side: u8,
    pub(super) network: Cidr,
    /// The filter rejects its addresses.
    pub(crate) is_excluded: bool,
}

impl SidedCidr {
    /// Returns the form for the programs.
    pub(crate) fn wire(&self, generation: u16) -> Network {
        let Cidr { address, length } = self.network;
        let (family, bytes) = match address {
            IpAddr::V4(address) => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&address.octets());
                (AF_INET, bytes)
            }
            IpAddr::V6(address) => (AF_INET6, address.octets()),
        };
        let words = zerocopy::transmute!(bytes);
        Network::new(generation, self.side, family, length.into(), words)
    }
}

impl Cidr {
    /// Returns the length of the address in bits.
    const fn bits(self) -> u8 {
        match self.address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        }
    }

    pub(super) fn check(self) -> Result<(), String> {
        let Self { address, length } = self;
        if length > self.bits() {
            return Err(format!("the length must be 0 to {}", self.bits()));
        }
        if address.to_canonical() != address {
            return Err(format!("write {} instead", address.to_canonical()));
        }
        let network = self.network(address);
        if network != Some(address) {
            return Err("it has bits beyond its length".into());
        }
        Ok(())
    }

    /// Returns the network of an address, cut to this length; `None` for another family.
    fn network(self, address: IpAddr) -> Option<IpAddr> {
        let host_bits = u32::from(self.bits().saturating_sub(self.length));
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
                Some(Ipv4Addr::from_bits(address.to_bits() & mask).into())
            }
            (IpAddr::V6(_), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                Some(Ipv6Addr::from_bits(address.to_bits() & mask).into())
            }
            _ => None,
        }
    }

    pub(super) fn contains(self, address: IpAddr) -> bool {
        self.network(address) == Some(self.address)
    }

    /// Returns whether all addresses of another network are in this one.
    pub(super) fn covers(self, other: Self) -> bool {
        self.length <= other.length && self.contains(other.address)
    }

    /// The networks of loopback addresses.
    pub(super) const LOOPBACK: [Self; 2] = [
        Self {
            address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)),
            length: 8,
        },
        Self {
            address: IpAddr::V6(Ipv6Addr::LOCALHOST),
            length: 128,
        },
    ];

    /// The networks of all addresses.
    pub(super) const ALL: [Self; 2] = [
        Self {
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            length: 0,
        },
        Self {
            address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            length: 0,
        },
    ];
}

impl Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, length } = self;
        write!(f, "{address}/{length}")
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| "not an IP address")?;
        let mut cidr = Self { address, length: 0 };
        cidr.length = match length {
            Some(length) => length.parse().map_err(|_| "not a length")?,
            None => cidr.bits(),
        };
        Ok(cidr)
    }
}
