#!/bin/sh
# The first process of a test guest. It mounts, loads the modules, says READY with what it sees, and then does what the kernel
# command line asks for (the kernel hands NAME=VALUE words that it does not know to its first process as environment):
#   polder_run="SHELL COMMANDS"    run these and say STATUS with their exit status; without it, a shell on the console
#   polder_end=poweroff|reboot|panic|halt    how to end afterwards (poweroff without it)
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts && mount -t devpts pts /dev/pts
while read -r module; do
    insmod "/modules/$module" || echo "POLDER-GUEST MODULE $module failed"
done < /modules/order
exec < /dev/console > /dev/console 2>&1
echo "POLDER-GUEST READY release=$(uname -r) cpus=$(grep -c ^processor /proc/cpuinfo) memory_kib=$(awk '/^MemTotal/ {print $2}' /proc/meminfo) uptime=$(cut -d' ' -f1 /proc/uptime)"
if [ -n "$polder_run" ]; then
    ( eval "$polder_run" )
    echo "POLDER-GUEST STATUS $?"
else
    echo "POLDER-GUEST SHELL (exit ends the guest)"
    setsid cttyhack sh
fi
sync
case "$polder_end" in
    reboot) reboot -f ;;
    panic) echo c > /proc/sysrq-trigger ;;
    halt) while :; do sleep 1000; done ;;
    *) poweroff -f ;;
esac
