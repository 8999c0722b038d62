//! What makes a Debian root file system a guest of ours: the packages it has, and the scripts that run while it is made.
//!
//! mmdebstrap runs each script with the new root as `$1`, as root or as root of a user namespace that owns it.

/// Packages of every image, each for a reason.
pub const PACKAGES: &[&str] = &[
    "systemd-sysv", // the first process
    "udev",         // device nodes and modules
    "login",        // the serial login
    "passwd",       // users
    "procps",       // ps, free, top
    "iproute2",     // ip
    "iputils-ping", // is the network there
    "kmod",         // modules
    "dbus",         // systemctl and hostnamectl speak it
    "e2fsprogs",    // checks the root file system
    "zstd",         // initramfs-tools compresses with it
    "initramfs-tools",
    "ca-certificates",
    "less",
];

/// Before the kernel is installed: its initrd holds the modules of a polder machine instead of those of every machine. Manual pages
/// are left out, but update-alternatives links to some (OpenJDK's, for one) and fails where there are no folders for them.
pub const BEFORE_PACKAGES: &str = r#"set -eu
for section in 1 2 3 4 5 6 7 8; do mkdir -p "$1/usr/share/man/man$section"; done
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=gzip\n' > "$1/etc/initramfs-tools/conf.d/polder"
printf '%s\n' virtio_pci virtio_blk virtio_net virtio_console virtio-rng ext4 pvpanic-mmio crc32c-intel crc32c_generic \
    > "$1/usr/share/initramfs-tools/modules.d/polder""#;

/// After the packages: names, login, network, the agent's service.
pub const AFTER_PACKAGES: &str = include_str!("customize.sh");

/// The kernel command line of an instance.
pub const COMMAND_LINE: &str = "root=/dev/vda rw console=ttyS0,115200 net.ifnames=0";

/// The script of an image named `name`.
pub fn after_packages(name: &str) -> String {
    format!("GUEST_HOSTNAME={name}\n{AFTER_PACKAGES}")
}

/// Turns the root file system into an ext4 disk on the open file `disk_fd`. The size is set already; everything unused stays a
/// hole. mmdebstrap has /proc and /sys mounted in the root at this time: a bind mount that does not follow mounts, in a mount
/// namespace of its own, shows the root without them.
pub fn make_disk(mke2fs: &str, disk_fd: i32) -> String {
    let options = "-q -F -t ext4 -L polder-root -m 1 -J size=32 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard";
    format!(
        "unshare --mount sh -euc 'mount --bind \"$1\" /mnt; {mke2fs} {options} -d /mnt /proc/self/fd/{disk_fd}' sh \"$1\""
    )
}
