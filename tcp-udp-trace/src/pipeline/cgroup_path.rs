//! Finds the container and the systemd unit in the path of a cgroup. No I/O.
//!
//! Container runtimes and systemd name cgroups by fixed rules. A name that follows none of them has
//! no container and no unit.

/// The beginnings of the names that container runtimes give to the cgroup of a container. The
/// container's id follows.
///
/// The runtimes' monitors have other names: `crio-conmon-…`, `libpod-conmon-…`.
const RUNTIMES: [&[u8]; 6] = [
    b"docker-",
    b"cri-containerd-",
    b"nerdctl-",
    b"crio-",
    b"libpod-",
    b"libpod-payload-",
];

/// The same, in the names that containerd and Docker give if the `systemd` form of a cgroup's name
/// is used with another manager: `slice:runtime:id`.
const RUNTIMES_OF_TRIPLES: [&[u8]; 4] = [b"docker", b"cri-containerd", b"nerdctl", b"crio"];

/// The folder of podman's pods. The id below it is that of a pod.
const PODS: &[u8] = b"libpod_parent";

/// Returns the id of the innermost container that a cgroup belongs to.
pub(crate) fn container(path: &[u8]) -> Option<&str> {
    let names: Vec<_> = names(path).collect();
    let id = (0..names.len()).rev().find_map(|at| {
        let above = at.checked_sub(1).map(|above| names[above]);
        container_of_name(names[at], above)
    });
    id.and_then(|id| std::str::from_utf8(id).ok())
}

fn container_of_name<'a>(name: &'a [u8], above: Option<&[u8]>) -> Option<&'a [u8]> {
    if is_id(name) {
        return (above != Some(PODS)).then_some(name);
    }
    let mut parts = name.split(|&byte| byte == b':');
    if let (Some(_slice), Some(runtime), Some(id), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    {
        return (RUNTIMES_OF_TRIPLES.contains(&runtime) && is_id(id)).then_some(id);
    }
    let name = name.strip_suffix(b".scope").unwrap_or(name);
    let mut ids = RUNTIMES
        .iter()
        .filter_map(|runtime| name.strip_prefix(*runtime));
    ids.find(|id| is_id(id))
}

/// Returns whether a name is the id of a container: the runtimes use 64 hexadecimal digits.
fn is_id(name: &[u8]) -> bool {
    name.len() == 64 && name.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns the systemd unit that a cgroup belongs to: the first name below the slices.
pub(crate) fn unit(path: &[u8]) -> Option<&str> {
    /// The types of units that have processes.
    const TYPES: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];
    let first = names(path).find(|name| slice_name(name).is_none())?;
    let name = unit_name(first)?;
    let has_type = |of: &&str| name.strip_suffix(of).is_some_and(|rest| !rest.is_empty());
    TYPES.iter().any(has_type).then_some(name)
}

/// Returns the systemd slice that a cgroup belongs to: the last one of those at the beginning.
pub(crate) fn slice(path: &[u8]) -> Option<&str> {
    names(path).map_while(slice_name).last()
}

fn slice_name(name: &[u8]) -> Option<&str> {
    let name = unit_name(name)?;
    name.strip_suffix(".slice")
        .is_some_and(|rest| !rest.is_empty())
        .then_some(name)
}

/// Returns the name of a unit, if a unit can have this name.
///
/// <https://systemd.io/CGROUP_DELEGATION/>, `unit_name_is_valid` and `cg_unescape` of systemd
fn unit_name(name: &[u8]) -> Option<&str> {
    // The mark of a name that would have another meaning in a folder of cgroups.
    let name = name.strip_prefix(b"_").unwrap_or(name);
    let is_valid = |&byte: &u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    if name.len() > 255 || !name.iter().all(is_valid) {
        return None;
    }
    std::str::from_utf8(name).ok()
}

fn names(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ids of containers.
    const A: &str = "3f4fbe1ad1a1fdd4c7ae1a90c7f1c8e0bf4b1d2f4a7cbb0a2c2e4e7ad2f30951";
    const B: &str = "90ab12cd34ef567890ab12cd34ef567890ab12cd34ef567890ab12cd34ef5678";

    /// Checks the container, the unit and the slice of a path, in which `A` and `B` are the ids.
    #[track_caller]
    fn check(path: &str, expected: (Option<&str>, Option<&str>, Option<&str>)) {
        let with_ids = |text: &str| text.replace("{A}", A).replace("{B}", B);
        let path = with_ids(path);
        let path = path.as_bytes();
        let (of_container, of_unit, of_slice) = expected;
        assert_eq!(container(path), of_container, "container");
        assert_eq!(unit(path), of_unit.map(with_ids).as_deref(), "unit");
        assert_eq!(slice(path), of_slice, "slice");
    }

    #[test]
    fn names_of_container_runtimes() {
        const PODS: &str = "/kubepods.slice/kubepods-burstable.slice/\
                            kubepods-burstable-pod8a3dd0a8_6f0c_4b30_9a5a_0f3fe3c9d3a1.slice";
        let pod = Some("kubepods-burstable-pod8a3dd0a8_6f0c_4b30_9a5a_0f3fe3c9d3a1.slice");
        // Docker with its own manager of cgroups, and with systemd's.
        check("/docker/{A}", (Some(A), None, None));
        check(
            "/system.slice/docker-{A}.scope",
            (Some(A), Some("docker-{A}.scope"), Some("system.slice")),
        );
        // systemd in a container, and a folder of the container's own.
        check(
            "/docker/{A}/system.slice/ssh.service",
            (Some(A), None, None),
        );
        check(
            "/system.slice/docker-{A}.scope/init.scope",
            (Some(A), Some("docker-{A}.scope"), Some("system.slice")),
        );
        check("/batch/job 7/{A}", (Some(A), None, None));
        check(
            "/ecs/5b9f5c6f4f0e4c1f8e8d6a1b2c3d4e5f/{A}",
            (Some(A), None, None),
        );
        // Kubernetes with containerd, CRI-O and Docker.
        check(
            "/kubepods/burstable/pod8a3dd0a8-6f0c-4b30-9a5a-0f3fe3c9d3a1/{A}",
            (Some(A), None, None),
        );
        for name in [
            "cri-containerd-{A}.scope",
            "crio-{A}.scope",
            "docker-{A}.scope",
        ] {
            check(&format!("{PODS}/{name}"), (Some(A), Some(name), pod));
        }
        check(
            &format!("{PODS}/crio-{{A}}.scope/container"),
            (Some(A), Some("crio-{A}.scope"), pod),
        );
        check(
            "/kubepods/besteffort/pod8a3dd0a8-6f0c-4b30-9a5a-0f3fe3c9d3a1/crio-{A}",
            (Some(A), None, None),
        );
        check(
            "/system.slice/containerd.service/kubepods-besteffort-pod1.slice:cri-containerd:{A}",
            (Some(A), Some("containerd.service"), Some("system.slice")),
        );
        check("/k8s.io/{A}", (Some(A), None, None));
        check(
            "/system.slice/nerdctl-{A}.scope",
            (Some(A), Some("nerdctl-{A}.scope"), Some("system.slice")),
        );
        // podman: as root and as a user, in a pod, and as a service of systemd.
        check(
            "/machine.slice/libpod-{A}.scope/container",
            (Some(A), Some("libpod-{A}.scope"), Some("machine.slice")),
        );
        check(
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope",
            (Some(A), Some("user@1000.service"), Some("user-1000.slice")),
        );
        check(
            "/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope",
            (
                Some(A),
                Some("libpod-{A}.scope"),
                Some(&format!("machine-libpod_pod_{B}.slice")),
            ),
        );
        check("/libpod_parent/libpod-{A}", (Some(A), None, None));
        check("/libpod_parent/{B}/libpod-{A}", (Some(A), None, None));
        check(
            "/system.slice/web.service/libpod-payload-{A}",
            (Some(A), Some("web.service"), Some("system.slice")),
        );
    }

    #[test]
    fn the_innermost_container_counts() {
        check("/docker/{A}/docker/{B}", (Some(B), None, None));
        check(
            "/system.slice/docker-{A}.scope/kubelet/kubepods/burstable/pod1/{B}",
            (Some(B), Some("docker-{A}.scope"), Some("system.slice")),
        );
        // The monitor of the inner container runs in the outer one.
        check(
            "/docker/{A}/machine.slice/libpod-conmon-{B}.scope",
            (Some(A), None, None),
        );
        check(
            "/docker/{A}/buildkit/kd0kq2ma1n7yw3zt9r6cbx5pf",
            (Some(A), None, None),
        );
    }

    #[test]
    fn other_names_have_no_container() {
        let system = Some("system.slice");
        for (path, unit, slice) in [
            ("/", None, None),
            ("/init.scope", Some("init.scope"), None),
            ("/system.slice", None, system),
            ("/system.slice/nginx.service", Some("nginx.service"), system),
            (
                "/system.slice/system-getty.slice/getty@tty1.service",
                Some("getty@tty1.service"),
                Some("system-getty.slice"),
            ),
            (
                "/user.slice/user-1000.slice/session-3.scope",
                Some("session-3.scope"),
                Some("user-1000.slice"),
            ),
            // A name that is escaped.
            ("/system.slice/_cpu.service", Some("cpu.service"), system),
            // Monitors of containers, and the folder of a pod of podman.
            (
                "/machine.slice/libpod-conmon-{A}.scope",
                Some("libpod-conmon-{A}.scope"),
                Some("machine.slice"),
            ),
            ("/kubepods/besteffort/pod1/crio-conmon-{A}", None, None),
            ("/libpod_parent/conmon", None, None),
            ("/libpod_parent/{A}/conmon", None, None),
            ("/libpod_parent/{A}", None, None),
            // Runtimes whose containers have no such id.
            ("/lxc/web", None, None),
            ("/lxc.payload.web/init.scope", None, None),
            ("/lxc.monitor.web", None, None),
            ("/docker/buildkit/kd0kq2ma1n7yw3zt9r6cbx5pf", None, None),
            (
                "/machine.slice/machine-web.scope/payload",
                Some("machine-web.scope"),
                Some("machine.slice"),
            ),
            ("/garden/0a1b2c3d-0a1b-4c2d-8e3f", None, None),
            // Names that are nearly right.
            ("/docker/3f4fbe1ad1a1", None, None),
            ("/docker/{A}0", None, None),
            (
                "/system.slice/docker-{A}0.scope",
                Some("docker-{A}0.scope"),
                system,
            ),
            ("/system.slice/docker-.scope", Some("docker-.scope"), system),
            ("/x:docker:{A}:y", None, None),
            ("/x:evil:{A}", None, None),
            ("/evil-{A}", None, None),
            ("/docker-{A}.slice", None, Some("docker-{A}.slice")),
            ("/DOCKER-{A}", None, None),
            ("/.service", None, None),
            ("/.slice/a.service", None, None),
            ("/a b.service", None, None),
            ("/a\u{1b}[31m.service", None, None),
            ("/not-a-slice/a.service", None, None),
            ("//system.slice//a.service//", Some("a.service"), system),
        ] {
            let slice = slice.map(|slice| slice.replace("{A}", A));
            check(path, (None, unit, slice.as_deref()));
        }
        let upper = format!("/docker/{}", A.to_uppercase());
        assert_eq!(container(upper.as_bytes()), None);
        let odd = [b"/docker/\xff\xfe".as_slice(), A.as_bytes()].concat();
        assert_eq!(container(&odd), None);
        assert_eq!(unit(b"/\xff.service"), None);
        let long = format!("/{}.service", "a".repeat(256));
        assert_eq!(unit(long.as_bytes()), None);
    }
}
