//! Debian images that are built into an encrypted domain. A script stands in for mmdebstrap, so that no package is needed: what it
//! leaves is known, and whether it was called.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::{Home, walk};

const DISK: &str = "what is on the disk of the dike warden";
const KERNEL: &str = "what would be a kernel of the dike warden";

/// Writes to the disk and into the folder that polder's hooks name.
fn stand_in(called: &Path) -> String {
    format!(
        r#"#!/bin/sh
set -eu
touch '{}'
for argument; do
    case $argument in
        *'copy-out /boot '*) eval "boot=${{argument##*copy-out /boot }}" ;;
        */proc/self/fd/*) disk=${{argument#*/proc/self/fd/}}; disk=${{disk%%[!0-9]*}} ;;
    esac
done
printf '%s' '{DISK}' | dd of=/proc/self/fd/$disk conv=notrunc status=none
mkdir -p "$boot/boot"
printf '%s' '{KERNEL}' > "$boot/boot/vmlinuz-1"
printf 'initrd' > "$boot/boot/plain-initrd.img-1"
printf 'linux-image-1' > "$boot/boot/kernel-package"
"#,
        called.display()
    )
}

#[test]
fn a_debian_is_built_into_an_encrypted_domain_and_not_begun_without_its_key() {
    let mut home = Home::new();
    let (programs, called, agent, out) =
        (home.path("programs"), home.path("called"), home.path("agent"), home.path("out"));
    std::fs::create_dir(&programs).unwrap();
    for program in ["mmdebstrap", "mke2fs", "zstd", "newuidmap"] {
        let path = Path::new(&programs).join(program);
        std::fs::write(&path, stand_in(Path::new(&called))).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::write(&agent, b"\x7fELF").unwrap();
    home.environment = vec![("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()))];
    let build = ["image", "build", "debian", "--size", "1G", "--agent", &agent, "--domain", "vault"];

    let refused = |reason: &str| {
        let outcome = home.polder(&build);
        outcome.expect_status(1);
        assert!(outcome.errors.contains(reason), "{outcome}");
    };
    refused("no domain vault");
    home.done(&["store", "domain", "create", "vault"]);
    let (key, aside) = (home.folder.join("keys/vault.key"), home.path("aside"));
    std::fs::rename(&key, &aside).unwrap();
    refused("domain vault is locked");
    assert!(!Path::new(&called).exists(), "nothing was begun");

    std::fs::rename(&aside, &key).unwrap();
    home.done(&build);
    home.done(&["image", "export", "debian", &out]);
    let mut start = vec![0; DISK.len()];
    File::open(&out).unwrap().read_exact(&mut start).unwrap();
    assert_eq!(start, DISK.as_bytes());
    for entry in walk(&home.folder) {
        let content = std::fs::read(&entry).unwrap();
        for text in [DISK, KERNEL] {
            assert!(!content.windows(text.len()).any(|window| window == text.as_bytes()), "{}", entry.display());
        }
    }
}
