#!/bin/sh
# The rows of `bench programs`; runs in a chroot of the guest whose root is the disk of the engine bench, a copy that can be written.
# This script's own disk, a package repository, is under /mnt. ROWS, which must be set, names the rows to run.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive
cd /tmp || exit 1
wanted() { case " $ROWS " in *" $1 "*) return 0 ;; esac; return 1; }
if wanted compile; then
    # Read from the disk beforehand, so that one and two processors start alike.
    gcc -O2 -S -x c -o /dev/null /dev/null
    /bench/rows time 1 compile sh -c \
        'printf "%s\n" 1 2 3 4 | xargs -P 2 -I{} gcc -O2 -S -o {}.s /bench/unit.c && cat 1.s 2.s 3.s 4.s'
fi
if wanted apt_install; then
    packages=$(cat /mnt/install)
    echo "deb [trusted=yes] copy:/mnt ./" > /etc/apt/sources.list
    apt-get -qq update
    # The checksum is of the versions of everything installed; that the files are those of the packages is seen afterwards.
    /bench/rows time 1 apt_install sh -c \
        "apt-get -qq -y --no-install-recommends install $packages >/tmp/apt.log 2>&1 && dpkg-query -W" || tail /tmp/apt.log
    [ -z "$(dpkg --verify $packages 2>&1)" ] || echo "FAIL apt_install dpkg --verify"
fi
exec /bench/bench.sh
