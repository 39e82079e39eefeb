//! Debian boots from a shared image: its private writes, its reboots, its crash, its firmware.

use crate::backend::Backend;
use crate::material::{Image, directory, text};
use crate::vm::{Guest, REBOOT, Vm};

/// Run by a tiny guest on a Debian disk that nothing has mounted: the root file system has to be
/// sound as it is.
const SOUND: &str = "e2fsck -fn /dev/vda2\n";

/// On its first run leaves data that only this guest has, and reboots; on later runs finds it.
fn remember(name: &str) -> String {
    format!(
        r#"
if [ ! -e /root/name ]; then
  dd if=/dev/urandom of=/root/data bs=1M count=24 status=none
  sha256sum /root/data > /root/data.sum
  # Files of the image itself, which the other guest has to keep seeing as they were.
  rm /etc/debian_version
  echo {name} > /etc/issue
  echo {name} > /root/name
  say wrote "$(cut -d' ' -f1 /root/data.sum)"
  exit {REBOOT}
fi
sha256sum --status -c /root/data.sum
[ ! -e /etc/debian_version ]
[ "$(cat /etc/issue)" = {name} ]
say found "$(cat /root/name)" "$(cut -d' ' -f1 /root/data.sum)"
"#
    )
}

#[test]
fn two_guests_share_an_image_and_keep_their_own_writes() {
    let image = Image::debian();
    let dir = directory();
    let names = ["ash", "birch"];

    let serve = |name: &str, create: bool| {
        let delta = text(&dir.path().join(format!("{name}.delta")));
        let mut args = vec!["--base", image.path(), "--delta", &delta];
        if create {
            args.push("--create");
        }
        Backend::start(dir.path(), name, &args)
    };

    // Both at once, each through a reboot of its own: the device is reset, QEMU and the backend stay.
    let running = names.map(|name| {
        let backend = serve(name, true);
        let vm = Vm::start(dir.path(), name, Guest::Debian, 1, &[&backend], &remember(name));
        (backend, vm)
    });
    let sums = running.map(|(backend, vm)| {
        let said = vm.finish();
        backend.stop();
        let (wrote, found) = (said.one("wrote"), said.one("found"));
        let (_, sum) = found.split_once(' ').expect("a name and a sum");
        assert_eq!(sum, wrote);
        sum.to_owned()
    });
    assert_ne!(sums[0], sums[1], "both guests have the same private data");

    // Everything anew: another backend, another QEMU, the same deltas.
    for (name, sum) in names.iter().zip(&sums) {
        let backend = serve(name, false);
        let check = format!(
            "{SOUND}
            mount -t ext4 -o ro /dev/vda2 /mnt
            say found $(cat /mnt/root/name) $(sha256sum </mnt/root/data | cut -d' ' -f1)
            umount /mnt"
        );
        let said = Vm::start(dir.path(), &format!("{name}-look"), Guest::Tiny, 1, &[&backend], &check).finish();
        assert_eq!(said.one("found"), format!("{name} {sum}"));
        backend.stop();
    }
    let backend = serve(names[0], false);
    let said = Vm::start(dir.path(), "ash-again", Guest::Debian, 1, &[&backend], &remember(names[0])).finish();
    assert_eq!(said.one("found"), format!("{} {}", names[0], sums[0]));
    assert!(said.all("wrote").is_empty());
    backend.stop();
    image.assert_unchanged();
}

/// Blocks that say themselves whether they are whole, each first written once and then over and over.
/// A block may then be of any age but never of two.
const FIO: &str = "fio --name=blocks --filename=/root/blocks --size=24M --bs=4k --ioengine=libaio \
    --iodepth=16 --direct=1 --verify=crc32c --thread --eta=never --output=/root/fio.log";

#[test]
fn a_killed_vmm_leaves_a_sound_disk() {
    /// Records that the guest has synced when it is killed.
    const RECORDS: u32 = 30;
    let image = Image::debian();
    let dir = directory();
    let delta = text(&dir.path().join("oak.delta"));
    // The same backend throughout: it has to serve on after a front end that vanished.
    let backend = Backend::start(dir.path(), "oak", &["--base", image.path(), "--delta", &delta, "--create"]);

    let write = format!(
        r#"
{FIO} --rw=randwrite --do_verify=0 --end_fsync=1
{FIO} --rw=randwrite --do_verify=0 --time_based --runtime=3600 &
fio=$!
mkdir /root/records
number=0
while :; do
  number=$((number + 1))
  # As a database does it: what is announced has been synced before.
  seq $number 3000 > /root/records/$number
  sync /root/records/$number /root/records
  kill -0 $fio
  say synced $number
done
"#
    );
    let mut vm = Vm::start(dir.path(), "oak", Guest::Debian, 2, &[&backend], &write);
    vm.wait_for(&format!("@@ synced {RECORDS}"));
    let said = vm.kill();
    assert!(!said.contains("@@pando end"), "fio had ended before the kill");
    let synced = said.all("synced").len();

    // Preening replays the journal and finishes what it names; anything beyond that is a status of 4.
    // After it nothing at all may be left to mend.
    let check = format!(
        "status=0
        e2fsck -p /dev/vda2 || status=$?
        say preened $status
        [ $status -le 1 ]
        {SOUND}"
    );
    let said = Vm::start(dir.path(), "oak-check", Guest::Tiny, 1, &[&backend], &check).finish();
    assert!(said.contains("recovering journal"), "the file system was not in use when the VMM was killed");

    let verify = format!(
        r#"
number=0
while [ $number -lt {synced} ]; do
  number=$((number + 1))
  seq $number 3000 | cmp - /root/records/$number
done
say records $number
{FIO} --rw=read --do_verify=1 || {{ cat /root/fio.log; exit 1; }}
# fio says nothing of blocks that it did not look at.
grep -q 'issued rwts: total=6144,' /root/fio.log
say verified
"#
    );
    let said = Vm::start(dir.path(), "oak-verify", Guest::Debian, 2, &[&backend], &verify).finish();
    assert_eq!(said.one("records"), synced.to_string());
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn firmware_and_boot_loader_in_the_image_boot_it() {
    let image = Image::debian();
    let dir = directory();
    let delta = text(&dir.path().join("elm.delta"));
    let args = ["--base", image.path(), "--delta", &delta];
    let backend = Backend::start(dir.path(), "elm", &[&args[..], &["--create"]].concat());
    let said = Vm::start(
        dir.path(),
        "elm",
        Guest::DebianByFirmware,
        1,
        &[&backend],
        "[ -d /sys/firmware/efi ]
        echo elm > /root/name
        say kernel \"$(uname -r)\"",
    )
    .finish();
    assert!(said.contains("@@pando grub"), "GRUB did not start the kernel");
    assert!(said.one("kernel").contains("cloud"));
    backend.stop();

    let backend = Backend::start(dir.path(), "elm", &args);
    let look = format!(
        "{SOUND}
        mount -t ext4 -o ro /dev/vda2 /mnt
        say found $(cat /mnt/root/name)
        umount /mnt"
    );
    let said = Vm::start(dir.path(), "elm-look", Guest::Tiny, 1, &[&backend], &look).finish();
    assert_eq!(said.one("found"), "elm");
    backend.stop();
    image.assert_unchanged();
}
