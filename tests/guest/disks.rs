//! One small disk per case, looked at by a guest of a few seconds.

use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::backend::Backend;
use crate::material::{Image, directory, disk_usage, sha256, text};
use crate::vm::{Guest, Said, Vm};

/// A tiny guest from start to power-off.
fn guest(dir: &TempDir, name: &str, disks: &[&Backend], script: &str) -> Said {
    Vm::start(dir.path(), name, Guest::Tiny, 1, disks, script).finish()
}

const SUM: &str = "say sum $(sha256sum </dev/vda | cut -d' ' -f1)\n";

#[test]
fn ephemeral_writes_are_gone() {
    let dir = directory();
    let image = Image::noise(dir.path(), 16, "ephemeral");
    let before = sha256(image.path());
    let write = "
        echo fleeting | dd of=/dev/vda bs=4096 seek=3 conv=notrunc,fsync
        dd if=/dev/zero of=/dev/vda bs=1M seek=8 count=2 conv=notrunc,fsync
        say read $(dd if=/dev/vda bs=4096 skip=3 count=1 | head -n 1)
    ";
    let args = ["--base", image.path(), "--ephemeral"];

    let backend = Backend::start(dir.path(), "first", &args);
    let said = guest(&dir, "write", &[&backend], &format!("{write}{SUM}"));
    assert_eq!(said.one("read"), "fleeting");
    assert_ne!(said.one("sum"), before);
    backend.stop();

    let backend = Backend::start(dir.path(), "second", &args);
    let said = guest(&dir, "look", &[&backend], SUM);
    assert_eq!(said.one("sum"), before);
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn a_read_only_disk_is_one_to_the_guest() {
    let dir = directory();
    let image = Image::noise(dir.path(), 16, "read-only");
    let backend = Backend::start(dir.path(), "backend", &["--base", image.path(), "--read-only"]);
    let script = format!(
        "{SUM}
        say ro $(cat /sys/block/vda/ro)
        if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=notrunc,fsync; then say write taken; else say write refused; fi
        # Past the kernel's own check, so that the device has to know as well.
        blockdev --setrw /dev/vda || true
        if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=notrunc,fsync; then say forced taken; else say forced refused; fi
        "
    );
    let said = guest(&dir, "look", &[&backend], &script);
    assert_eq!(said.one("sum"), sha256(image.path()));
    assert_eq!(said.one("ro"), "1");
    assert_eq!(said.one("write"), "refused");
    assert_eq!(said.one("forced"), "refused");
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn writes_over_two_queues_survive_the_process() {
    let dir = directory();
    let image = Image::noise(dir.path(), 16, "queues");
    let delta = text(&dir.path().join("queues.delta"));
    // Larger than its base: the rest is zeros.
    let args = ["--base", image.path(), "--delta", &delta];
    let backend = Backend::start(dir.path(), "first", &[&args[..], &["--create", "--size", "1G"]].concat());
    // Odd sectors by one writer, even ones by another, in the same clusters. The block size is the guest's own for what
    // it writes at once, as long as the disk is open.
    let write = "
        say bytes $(blockdev --getsize64 /dev/vda)
        say queues $(ls /sys/block/vda/mq | wc -l)
        dd if=/dev/vda of=/tmp/tail bs=1M skip=1023 count=1
        cmp -n 1048576 /tmp/tail /dev/zero
        sector=0
        while [ $sector -lt 64 ]; do printf '%-511s\\n' \"sector $sector\"; sector=$((sector + 1)); done > /tmp/expected
        exec 3</dev/vda
        blockdev --setbsz 512 /dev/vda
        writer() {
          sector=$1
          while [ $sector -lt 64 ]; do
            dd if=/tmp/expected of=/dev/vda bs=512 count=1 skip=$sector seek=$((16384 + sector)) conv=notrunc,fsync 2>/dev/null
            sector=$((sector + 2))
          done
        }
        writer 0 & writer 1 & wait
        echo end | dd of=/dev/vda bs=512 seek=2097151 conv=notrunc,fsync
        echo 3 > /proc/sys/vm/drop_caches
        dd if=/dev/vda bs=512 skip=16384 count=64 | cmp - /tmp/expected
    ";
    let sum = "say sum $(dd if=/dev/vda bs=1M count=64 | sha256sum | cut -d' ' -f1) $(dd if=/dev/vda bs=512 skip=2097151 | head -n 1)\n";
    let script = format!("{write}{sum}");
    let said = Vm::start(dir.path(), "write", Guest::Tiny, 2, &[&backend], &script).finish();
    assert_eq!(said.one("bytes"), (1_u64 << 30).to_string());
    assert_eq!(said.one("queues"), "2");
    let before = said.one("sum").to_owned();
    assert!(before.ends_with(" end"), "{before}");
    backend.stop();

    let backend = Backend::start(dir.path(), "second", &args);
    let said = guest(&dir, "look", &[&backend], sum);
    assert_eq!(said.one("sum"), before);
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn a_killed_backend_has_lost_no_completed_write() {
    let dir = directory();
    let image = Image::noise(dir.path(), 16, "killed");
    let delta = text(&dir.path().join("killed.delta"));
    let args = ["--base", image.path(), "--delta", &delta];
    let backend = Backend::start(dir.path(), "first", &[&args[..], &["--create"]].concat());
    // Told that there is no write cache, the guest's kernel sends no flush: what it wrote is complete and no more.
    let content = "yes is full | dd bs=1M count=4 iflag=fullblock";
    let write = format!(
        "
        echo write through > /sys/block/vda/queue/write_cache
        {content} of=/dev/vda seek=2 conv=notrunc,fsync
        blkdiscard -o 8388608 -l 1048576 /dev/vda
        say written
        sleep 3600
        "
    );
    let mut vm = Vm::start(dir.path(), "write", Guest::Tiny, 1, &[&backend], &write);
    vm.wait_for("@@ written");
    backend.kill();
    vm.kill();

    let backend = Backend::start(dir.path(), "second", &args);
    let look = format!(
        "
        {content} > /tmp/expected
        dd if=/dev/vda bs=1M skip=2 count=4 | cmp - /tmp/expected
        dd if=/dev/vda bs=1M skip=8 count=1 | cmp -n 1048576 - /dev/zero
        "
    );
    guest(&dir, "look", &[&backend], &look);
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn a_paused_guest_goes_on_where_it_was() {
    /// Pauses in the midst of writes. Each stops every ring and starts it again from the index that the
    /// backend gave back.
    const PAUSES: u32 = 6;
    let dir = directory();
    let image = Image::noise(dir.path(), 16, "pause");
    let backend = Backend::start(dir.path(), "backend", &["--base", image.path(), "--ephemeral"]);
    // For longer than the pauses take, however fast the guest is.
    let script = "
        round=0
        end=$(($(date +%s) + 6))
        while [ $round -lt 3 ] || [ $(date +%s) -lt $end ]; do
          round=$((round + 1))
          yes \"round $round\" | head -c 4194304 > /tmp/expected
          dd if=/tmp/expected of=/dev/vda bs=4096 oflag=direct conv=notrunc 2>/dev/null
          dd if=/dev/vda bs=65536 count=64 iflag=direct 2>/dev/null | cmp - /tmp/expected
          say round $round
        done
    ";
    let mut vm = Vm::start(dir.path(), "guest", Guest::Tiny, 1, &[&backend], script);
    vm.wait_for("@@ round 1");
    for _ in 0..PAUSES {
        vm.pause(Duration::from_millis(100));
        thread::sleep(Duration::from_millis(200));
    }
    let said = vm.finish();
    assert!(said.all("round").len() >= 3);
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    const MIB: u64 = 1 << 20;
    let dir = directory();
    let image = Image::noise(dir.path(), 32, "discard");
    let path = dir.path().join("discard.delta");
    let delta = text(&path);
    let args = ["--base", image.path(), "--delta", &delta];
    let backend = Backend::start(dir.path(), "first", &[&args[..], &["--create"]].concat());
    let fresh = disk_usage(&path);

    // Lines of eight bytes, so that one starts at every sector.
    let fill = "yes is full | dd of=/dev/vda bs=1M count=24 iflag=fullblock conv=notrunc,fsync";
    guest(&dir, "fill", &[&backend], fill);
    let full = disk_usage(&path);
    assert!(full >= fresh + 24 * MIB, "{fresh} bytes, then {full}");

    let discard = format!(
        "blkdiscard -o 0 -l {} /dev/vda
        sync
        dd if=/dev/vda bs=1M count=16 | cmp -n {} - /dev/zero
        say kept $(dd if=/dev/vda bs=1M skip=16 count=1 | head -n 1)",
        16 * MIB,
        16 * MIB
    );
    let said = guest(&dir, "discard", &[&backend], &discard);
    assert_eq!(said.one("kept"), "is full");
    let after = disk_usage(&path);
    assert!(after <= full - 15 * MIB, "{full} bytes, then {after}");
    backend.stop();

    // What was discarded hides the base for good.
    let backend = Backend::start(dir.path(), "second", &args);
    let look = format!("dd if=/dev/vda bs=1M count=16 | cmp -n {} - /dev/zero", 16 * MIB);
    guest(&dir, "look", &[&backend], &look);
    backend.stop();
    image.assert_unchanged();
}

#[test]
fn a_blank_disk_beside_a_read_only_one_takes_a_file_system() {
    let dir = directory();
    let image = Image::noise(dir.path(), 8, "system");
    let delta = text(&dir.path().join("data.delta"));
    let system = Backend::start(dir.path(), "system", &["--base", image.path(), "--read-only", "--serial", "SYSTEM"]);
    let data = Backend::start(
        dir.path(),
        "data",
        &["--blank", "--size", "256M", "--delta", &delta, "--create", "--serial", "DATA"],
    );
    let write = "
        say serials $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)
        mkfs.ext4 -q /dev/vdb
        mount -t ext4 /dev/vdb /mnt
        cat /dev/vda > /mnt/copy
        umount /mnt
        e2fsck -fn /dev/vdb
    ";
    let said = guest(&dir, "write", &[&system, &data], write);
    assert_eq!(said.one("serials"), "SYSTEM DATA");

    // The guest reboots itself in the middle of its writes, as a reset button would have it: the
    // journal has to be whole, and what was synced there.
    let reset = "
        mount -t ext4 /dev/vdb /mnt
        if [ ! -e /mnt/synced ]; then
          cp /mnt/copy /mnt/synced
          sync
          cp /mnt/copy /mnt/unsynced &
          dd if=/dev/zero of=/mnt/zeros bs=4096 count=8192 &
          usleep 200000
          exit 100
        fi
        cmp /mnt/synced /dev/vda
        umount /mnt
        e2fsck -fn /dev/vdb
        say survived yes
    ";
    let said = guest(&dir, "reset", &[&system, &data], reset);
    assert_eq!(said.one("survived"), "yes");
    assert!(said.contains("@@pando end 100"), "the guest did not reboot");
    system.stop();
    data.stop();
    image.assert_unchanged();
}
