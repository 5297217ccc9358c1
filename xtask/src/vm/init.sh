#!/bin/sh
# PID 1 of a test guest: mounts file systems, loads modules, runs the tests, writes their exit code,
# and powers off. xtask/src/vm/guest.rs reads the lines that start with @@.

# busybox warns that sh, which is not its own, exists.
/bin/busybox --install -s /bin 2>/dev/null
# iproute2's ip comes before busybox's. TERM keeps colours out of the console, which becomes a log.
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
# systemd does this, too.
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
mount -t bpf bpf /sys/fs/bpf
# tracefs stays unmounted, as on minimal systems, where the library has to work too.

for module in /modules/*.ko; do
    insmod "$module" || echo "cannot load $module"
done
echo "not in this kernel as modules: $(cat /modules/missing)"

hostname guest
ip link set lo up
ulimit -n 65536
cd /tmp

# If no test ends for long, this shows whether the guest still runs.
while sleep 30; do echo "@@alive"; done &

echo "@@begin"
/tests/run
code=$?
# The output of the tests may end in the middle of a line.
echo
echo "@@end $code"
poweroff -f
