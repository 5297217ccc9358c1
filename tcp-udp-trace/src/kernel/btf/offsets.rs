//! Finds the offsets of the fields that the programs read on the running kernel.

use nix::unistd::{SysconfVar, sysconf};
use tcp_udp_trace_common::{ABSENT, FIELDS, Field, Offsets};

use super::Btf;
use crate::error::{Error, ErrorKind};

/// Required fields. Without any other field, only one detail is missing.
const REQUIRED: &[Field] = {
    use Field::{Family, LocalPort, Protocol, RemotePort, State};
    &[Family, LocalPort, Protocol, RemotePort, State]
};

/// Looks up every field.
pub(in crate::kernel) fn resolve(btf: &Btf<'_>) -> Result<Offsets, Error> {
    let mut offsets: Offsets = std::array::from_fn(|index| {
        let required = &FIELDS[index];
        let bitfield = |path| btf.bitfield(path).map(|(offset, _)| (offset, 1));
        let field = |path| btf.field(path).map(|field| (field.offset, field.size));
        let mut paths = required.path.split(" | ");
        match paths.find_map(|path| field(path).or_else(|| bitfield(path))) {
            Some((offset, size)) if size == required.size => offset,
            _ => {
                log::info!(
                    "this kernel has no {} of {} bytes",
                    required.path,
                    required.size
                );
                ABSENT
            }
        }
    });
    if btf.field("net.net_cookie.counter").is_some() {
        // It is atomic before Linux 5.12: a namespace has a cookie only once a program queries it.
        // https://lore.kernel.org/netdev/20210210144144.24284-1-eric.dumazet@gmail.com/
        offsets[Field::NetCookie as usize] = ABSENT;
    }
    match REQUIRED
        .iter()
        .find(|&&field| offsets[field as usize] == ABSENT)
    {
        None => Ok(offsets),
        Some(&field) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "this kernel's {} is unknown to this library: report the kernel's version",
                FIELDS[field as usize].path
            ),
        )),
    }
}

/// Returns 1 if the kernel stores the ids of a cgroup's ancestors, rather than pointers to them.
pub(in crate::kernel) fn ancestor_ids(btf: &Btf<'_>) -> u8 {
    u8::from(btf.field("cgroup.ancestor_ids").is_some())
}

/// Returns the bits of bitfields in their bytes, by the name of their global. 0 if a bitfield is
/// unknown.
pub(in crate::kernel) fn bitfields(btf: &Btf<'_>) -> [(&'static str, u8); 2] {
    let bits = |field| {
        let bitfield = btf.bitfield(FIELDS[field as usize].path);
        bitfield.map_or(0, |(_, bits)| bits)
    };
    // The programs compare this one with numbers.
    let ca_state = Some(bits(Field::CaState)).filter(|bits| bits & 1 == 1);
    [
        ("REPAIR", bits(Field::Repair)),
        ("CA_STATE", ca_state.unwrap_or(0)),
    ]
}

/// Returns the kernel's reasons of resets: number and name. Empty before Linux 6.10.
pub(in crate::kernel) fn reset_reasons(btf: &Btf<'_>) -> Vec<(u32, String)> {
    let all = btf.enumerators("sk_rst_reason");
    let named = all.filter_map(|(value, name)| {
        let name = str::from_utf8(name).ok()?;
        Some((value, name.strip_prefix("SK_RST_REASON_")?.to_owned()))
    });
    named.collect()
}

/// Returns the bit of `sock.sk_flags` that the kernel sets when a socket begins to listen; 0 if it
/// is unknown.
pub(in crate::kernel) fn has_listened(btf: &Btf<'_>) -> u64 {
    let bit = btf.enumerator("sock_flags", "SOCK_RCU_FREE");
    bit.and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0)
}

/// Returns the values of `enum skb_drop_reason` that the programs use, by the name of their global.
/// Before 5.18, the kernel does not report that a program at the cgroup refused a packet.
pub(in crate::kernel) fn drop_reasons(btf: &Btf<'_>) -> [(&'static str, u32); 3] {
    let reason = |name| btf.enumerator("skb_drop_reason", name).unwrap_or(u32::MAX);
    [
        ("REFUSED", reason("SKB_DROP_REASON_BPF_CGROUP_EGRESS")),
        ("NOT_SPECIFIED", reason("SKB_DROP_REASON_NOT_SPECIFIED")),
        ("NO_NEIGHBOR", reason("SKB_DROP_REASON_NEIGH_CREATEFAIL")),
    ]
}

/// Returns the offset of a task's saved user registers from the beginning of its kernel stack, in
/// bytes. 0 if it is unknown.
///
/// The kernel has no type for the size of a stack. It is 16 KiB, and one page where pages are
/// larger ([x86_64], [aarch64]). A kernel with KASAN has larger stacks. There, the programs find no
/// registers.
///
/// [x86_64]: https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/page_64_types.h#L15
/// [aarch64]: https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/include/asm/memory.h#L113
pub(in crate::kernel) fn registers(btf: &Btf<'_>) -> u64 {
    const STACK: u64 = 16 << 10;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|page| u64::try_from(page).ok()).unwrap_or(0);
    let size = btf.size_of("pt_regs").map_or(u64::MAX, u64::from);
    STACK.max(page).saturating_sub(size)
}

/// Returns whether programs of all types may call the helper that returns the current task with
/// its type.
///
/// Linux 5.19 has both this and the structure. Some earlier kernels allow the helper only to
/// tracing programs.
pub(in crate::kernel) fn types_task(btf: &Btf<'_>) -> bool {
    btf.id(super::kind::STRUCT, "bpf_dynptr_kern").is_some()
}

/// Returns whether the kernel may preempt a program of a raw or BTF tracepoint.
///
/// Until Linux 6.19, all programs of a tracepoint run with preemption disabled
/// ([`__DO_TRACE_CALL`][before]). Linux 7.0 protects them by SRCU instead, and remembers its grace
/// periods in `tp_transition_snapshot.srcu_gp` ([`tracepoint.c`][after]). A kernel with a part of
/// that counts as one that preempts: `srcu_reader_flavor` came with the variant of SRCU that the
/// change needs.
///
/// [before]: https://github.com/torvalds/linux/blob/v6.12/include/linux/tracepoint.h
/// [after]: https://github.com/torvalds/linux/blob/v7.0/kernel/tracepoint.c
pub(in crate::kernel) fn preempts_tracepoints(btf: &Btf<'_>) -> bool {
    let signs = [
        "tp_transition_snapshot.srcu_gp",
        "srcu_struct.srcu_reader_flavor",
    ];
    signs.iter().any(|path| btf.field(path).is_some())
}

/// Returns whether a hash map may allocate its entries when programs insert them. Linux 6.1 has an
/// allocator for that. Earlier kernels warn that such an allocation may deadlock.
pub(in crate::kernel) fn allocates_on_demand(btf: &Btf<'_>) -> bool {
    btf.field("bpf_htab.ma.cache").is_some()
}

/// Returns whether writers of the ring buffer take a lock that sleeps on this kernel.
///
/// Programs at tracepoints must not sleep. On real-time kernels, `spinlock_t` sleeps, and the ring
/// buffer [had such a lock][raw] before Linux 6.12 and its backports.
///
/// [raw]: https://git.kernel.org/torvalds/c/8b62645b09f870d70c7910e7550289d444239a46
pub(in crate::kernel) fn ring_buffer_sleeps(btf: &Btf<'_>) -> bool {
    btf.field(&format!("bpf_ringbuf.spinlock.{SLEEPS}"))
        .is_some()
}

/// The member of a `spinlock_t` that sleeps: on real-time kernels, it is an `rt_mutex`.
const SLEEPS: &str = "lock.wait_lock";

/// Returns whether writers of a map of networks take a lock that sleeps on this kernel.
pub(in crate::kernel) fn networks_sleep(btf: &Btf<'_>) -> bool {
    btf.field(&format!("lpm_trie.lock.{SLEEPS}")).is_some()
}

/// Returns whether this kernel verifies the loops of `image` in milliseconds.
///
/// The verifiers of 5.10 and 6.1 take minutes, because they track irrelevant numbers in programs
/// with functions. `backtrack_state` came with the improvement. The verifier of 7.2 takes minutes,
/// too. The name of a function identifies it.
pub(in crate::kernel) fn verifies_images(btf: &Btf<'_>) -> bool {
    let has = |kind, name| btf.id(kind, name).is_some();
    has(super::kind::STRUCT, "backtrack_state")
        && !has(super::kind::FUNC, "bpf_compute_live_registers")
}

/// Returns whether the same holds for the programs of UDP. The verifier of 6.12 does not finish
/// them. The name of a function distinguishes 6.12 from 6.18.
pub(in crate::kernel) fn verifies_images_of_udp(btf: &Btf<'_>) -> bool {
    let newer = btf.id(super::kind::FUNC, "bpf_stream_stage_printk");
    newer.is_some() && verifies_images(btf)
}

#[cfg(test)]
mod tests {
    use super::{super::source::read_own, *};

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn the_running_kernel_has_every_field() {
        let Ok(btf) = read_own() else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let btf = Btf::parse(&btf).expect("the running kernel's BTF");
        let offsets = resolve(&btf).expect("the fields of the running kernel");
        let missing: Vec<_> = offsets
            .iter()
            .zip(FIELDS)
            .filter(|(offset, _)| **offset == ABSENT)
            .map(|(_, f)| f.path)
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn tcp_info_matches_the_running_kernel() {
        let Ok(btf) = read_own() else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let btf = Btf::parse(&btf).expect("the running kernel's BTF");
        for (name, offset, size) in crate::event::tcp_info::TcpInfo::FIELDS {
            // Some kernels lack some of the fields.
            if let Some(field) = btf.field(&format!("tcp_info.tcpi_{name}")) {
                assert_eq!(
                    (field.offset, field.size as usize),
                    (*offset, *size),
                    "{name}"
                );
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn the_running_kernel_saves_registers_below_the_end_of_a_stack() {
        let Ok(btf) = read_own() else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let at = registers(&Btf::parse(&btf).expect("the running kernel's BTF"));
        assert!(
            (15 << 10..64 << 10).contains(&at) && at.is_multiple_of(8),
            "{at}"
        );
    }
}
