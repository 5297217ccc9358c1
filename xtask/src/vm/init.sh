#!/bin/sh
# PID 1 of a test guest: mounts what a system has, loads modules, runs the tests, says how they ended, powers off.
# The lines that start with @@ are read by xtask/src/vm/guest.rs.

# It complains that sh, which is not busybox's, is there already.
/bin/busybox --install -s /bin 2>/dev/null
# iproute2's ip comes before busybox's. The console is no place for colours: it becomes a log.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb RUST_BACKTRACE=1

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# As systemd does.
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
mount -t bpf bpf /sys/fs/bpf
# Not tracefs: minimal systems do not mount it either, and the library has to cope.

for module in /modules/*.ko; do
    insmod "$module" || echo "cannot load $module"
done
echo "not in this kernel as modules: $(cat /modules/missing)"

hostname guest
ip link set lo up
ulimit -n 65536
cd /tmp

echo "@@begin"
/tests/run
code=$?
# A test may have left the cursor in the middle of a line.
echo
echo "@@end $code"
poweroff -f
