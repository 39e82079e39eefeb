//! The Debian package in a Debian with systemd: installed, used, restarted, killed, removed.
//!
//! What only a booted system shows: that the daemon works inside all that its unit forbids, and that backends outlive it there.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::backend::Backend;
use crate::material::{Image, directory, text};
use crate::vm::{Guest, Vm};

/// The C library of the guest's release, which the package has to be content with.
const GUEST_LIBC: (u32, u32) = (2, 36);

const SCRIPT: &str = r#"
exec 2>&1
mount -t ext4 -o ro /dev/vdb /mnt
dpkg -i /mnt/pando.deb >/dev/null
say installed $(systemctl is-active pando) $(systemctl is-enabled pando)

# From where people keep images, and from where they make them.
for place in /root /home /tmp; do
  head -c 8M /dev/urandom >$place/disk.raw
  pando image import $place/disk.raw --version from${place#/} >/dev/null
done
say images $(pando image list --json | grep -o '"digest"' | wc -l)
pando channel set stable fromroot >/dev/null
pando volume create root --channel stable --kind cow >/dev/null
say socket $(pando attach root --vm vm)
keeper() { pando attachment show vm root --json | sed -n 's/.*"process": *\([0-9]*\).*/\1/p'; }
main() { systemctl show pando -p MainPID --value; }
before=$(keeper)
say locked $(sed -n 's/^CapBnd:[ \t]*0*//p; s/^NoNewPrivs:[ \t]*//p; s/^Seccomp:[ \t]*//p' /proc/$before/status)
say limits $(sed -n 's/^Max core file size *\([0-9]*\).*/\1/p; s/^Max open files *\([0-9]*\).*/\1/p' /proc/$before/limits)

systemctl restart pando
[ "$(keeper)" = "$before" ]
old=$(main)
kill -KILL $old
until [ "$(systemctl is-active pando)" = active ] && [ "$(main)" != $old ]; do sleep 0.2; done
[ "$(keeper)" = "$before" ]
say restarted kept
dpkg -i /mnt/pando.deb >/dev/null
[ "$(keeper)" = "$before" ]
say upgraded kept

# Another user sees what he is granted, and nothing else.
useradd -m ann
if su ann -c 'pando volume list' >/dev/null; then say stranger let; else say stranger refused; fi

systemctl stop pando
say stopped $(systemctl is-active pando || true)
grep -q managed /proc/$before/cmdline
dpkg -r pando >/dev/null
grep -q managed /proc/$before/cmdline
[ -S /run/pando/vm/vm/root.sock ]
[ -e /var/lib/pando/pando.db ]
say removed kept
"#;

#[test]
fn the_package_makes_a_service_that_backends_outlive() {
    if libc_version() > GUEST_LIBC {
        // Built here, the package would ask for a library that the guest does not have.
        eprintln!("not tried: programs that are built here do not run on the guest's Debian 12");
        return;
    }
    let image = Image::debian();
    let dir = directory();
    let disk = disk_with(dir.path(), &package());
    let system = Backend::start(dir.path(), "system", &["--base", image.path(), "--ephemeral"]);
    let media = Backend::start(dir.path(), "media", &["--base", &text(&disk), "--read-only"]);
    let said = Vm::start(dir.path(), "package", Guest::Debian, 1, &[&system, &media], SCRIPT).finish();
    assert_eq!(said.one("installed"), "active enabled");
    assert_eq!(said.one("images"), "3");
    assert_eq!(said.one("socket"), "/run/pando/vm/vm/root.sock");
    // CAP_CHOWN and CAP_DAC_READ_SEARCH; no new privileges; a filter of system calls.
    assert_eq!(said.one("locked"), "5 1 2");
    // No core of its own, and no more descriptors than its sandbox leaves it.
    assert_eq!(said.one("limits"), "0 4096");
    assert_eq!(said.one("restarted"), "kept");
    assert_eq!(said.one("upgraded"), "kept");
    assert_eq!(said.one("stranger"), "refused");
    assert_eq!(said.one("stopped"), "inactive");
    assert_eq!(said.one("removed"), "kept");
    system.stop();
    media.stop();
    image.assert_unchanged();
}

/// The package, made of what is built.
fn package() -> PathBuf {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/package");
    let output = Command::new(&tool).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", tool.display()));
    assert!(output.status.success(), "{}: {}", tool.display(), output.status);
    let said = String::from_utf8(output.stdout).expect("the tool prints text");
    said.lines().last().expect("its last line is the package").into()
}

/// A disk with a file system that holds the package.
fn disk_with(dir: &Path, package: &Path) -> PathBuf {
    const DISK_BYTES: u64 = 64 << 20;
    let (content, disk) = (dir.join("content"), dir.join("media.raw"));
    std::fs::create_dir(&content).expect("the test's directory takes files");
    std::fs::copy(package, content.join("pando.deb")).expect("the package can be copied");
    let file = std::fs::File::create(&disk).expect("the test's directory takes files");
    file.set_len(DISK_BYTES).expect("a sparse file takes no room");
    let status = Command::new("/sbin/mkfs.ext4").args(["-q", "-d"]).args([&content, &disk]).status();
    assert!(status.expect("mkfs.ext4 starts").success());
    disk
}

/// This machine's C library.
fn libc_version() -> (u32, u32) {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().expect("getconf starts");
    let text = String::from_utf8(output.stdout).expect("it prints text");
    let version = text.trim().rsplit(' ').next().and_then(|version| version.split_once('.'));
    let (major, minor) = version.expect("glibc has a version of two numbers");
    (major.parse().expect("a number"), minor.parse().expect("a number"))
}
