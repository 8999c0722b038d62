# Runs on the host with the new root file system as $1, after its packages are there. The caller sets GUEST_HOSTNAME.
set -eu
root="$1"
echo "$GUEST_HOSTNAME" > "$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost\n' "$GUEST_HOSTNAME" > "$root/etc/hosts"
echo '/dev/vda / ext4 noatime,errors=remount-ro 0 1' > "$root/etc/fstab"
# Each instance makes its own; an empty file says so without the work of a first boot.
: > "$root/etc/machine-id"
: > "$root/etc/resolv.conf"
chroot "$root" passwd --delete root >/dev/null

mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
cat > "$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 %I $TERM
END

cat > "$root/etc/systemd/system/polder-agent.service" <<'END'
[Unit]
Description=polder guest agent
DefaultDependencies=no
After=local-fs.target systemd-modules-load.service systemd-tmpfiles-setup.service
Before=basic.target
Conflicts=shutdown.target
Before=shutdown.target
# It is the only way in: it is started again however often it ends.
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/local/sbin/polder-agent
Restart=always
RestartSec=1

[Install]
WantedBy=basic.target
END
echo vmw_vsock_virtio_transport > "$root/etc/modules-load.d/polder.conf"

mkdir -p "$root/etc/systemd/network"
printf '[Match]\nName=e*\n\n[Network]\nDHCP=yes\n' > "$root/etc/systemd/network/80-dhcp.network"
chroot "$root" systemctl --quiet enable polder-agent.service systemd-networkd.service serial-getty@ttyS0.service
# Work that a machine which lives for minutes does not want, and the wait for a network that may not be there.
chroot "$root" systemctl --quiet mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer fstrim.timer getty@tty1.service e2scrub_reap.service

chroot "$root" dpkg-query --show --showformat='${Package} ${Version}\n' 'linux-image-[0-9]*' | head -n 1 > "$root/boot/kernel-package"

# The initrd that instances boot from is not compressed: unpacking it here once is cheaper than in each guest.
for initrd in "$root"/boot/initrd.img-*; do
    gzip --decompress --stdout "$initrd" > "$root/boot/plain-${initrd##*/}"
done
