//! A new image, or a larger disk, for guests that run: what each of them boots next, and that nothing but a boot changes anything.
//!
//! Debian says twice which version of its image it is of: in /etc/os-release, which is in its root, and on its kernel's command
//! line, which the boot loader reads beside the kernel. Both have to be of one version, always.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::host::Host;
use crate::material::{self, Image, directory};
use crate::process::wait_until;
use crate::relay::Relay;
use crate::vm::{Guest, REBOOT, Vm};

const CHANNEL: &str = "debian";
/// For the daemon to hear of what a backend did.
const NEWS_LIMIT: Duration = Duration::from_secs(20);

/// Says at each start what the system is, and how many starts its disk remembers; then does what it is told: looks again, past
/// all caches, or ends with a status.
const OBEY: &str = r#"
versions() {
  echo 3 >/proc/sys/vm/drop_caches
  root=$(sed -n 's/^IMAGE_VERSION=//p' /etc/os-release)
  kernel=$(sed -n 's/.*pando.version=\([0-9]*\).*/\1/p' /proc/cmdline)
  echo "$root $kernel"
}
starts=none
if [ "$(cat /sys/block/vda/ro)" = 0 ]; then
  echo start >>/root/starts
  sync
  starts=$(wc -l </root/starts)
fi
say system $(versions) $starts
while read -r order </dev/ttyS0; do
  if [ "$order" != look ]; then exit "$order"; fi
  say looked $(versions)
done
"#;

/// A VM, by the name that its volume has, too.
struct Machine {
    name: &'static str,
    vm: Vm,
    starts: usize,
    looks: usize,
}

impl Machine {
    fn start(dir: &Path, name: &'static str, socket: &Path) -> Self {
        let vm = Vm::start_on(dir, name, Guest::DebianByFirmware, 1, &[socket], OBEY);
        Self { name, vm, starts: 0, looks: 0 }
    }

    /// Waits for the next start of its system: versions of root and kernel, and the starts that its disk has seen.
    fn system(&mut self) -> String {
        self.starts += 1;
        self.vm.hear("system", self.starts)
    }

    fn reboot(&mut self) {
        self.vm.order(&REBOOT.to_string());
    }

    /// What the disk says now.
    fn look(&mut self) -> String {
        self.looks += 1;
        self.vm.order("look");
        self.vm.hear("looked", self.looks)
    }

    fn power_off(mut self) {
        self.vm.order("0");
        self.vm.finish();
    }
}

#[test]
fn an_update_comes_at_a_boot_and_at_nothing_else() {
    let dir = directory();
    let host = Host::start(dir.path());
    // As others publish images.
    let qcow2 = dir.path().join("debian.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-O", "qcow2"]).arg(material::file("debian.raw")).arg(&qcow2);
    let status = convert.status().expect("qemu-img starts");
    assert!(status.success(), "qemu-img: {status}");
    host.import(&qcow2, "first");
    host.set_channel(CHANNEL, "first");

    for (name, kind) in [("ash", &["cow"][..]), ("oak", &["read-only"]), ("elm", &["cow", "--ephemeral"])] {
        host.create(name, CHANNEL, kind);
    }
    // The two that will change lose their connections later on.
    let relays = ["oak", "elm"].map(|name| Relay::new(&host.attach(name)));
    let mut ash = Machine::start(dir.path(), "ash", &host.attach("ash"));
    let [of_oak, of_elm] = &relays;
    let mut oak = Machine::start(dir.path(), "oak", of_oak.socket());
    let mut elm = Machine::start(dir.path(), "elm", of_elm.socket());
    assert_eq!(ash.system(), "1 1 1");
    assert_eq!(oak.system(), "1 1 none");
    assert_eq!(elm.system(), "1 1 1");

    // The channel moves under running guests.
    host.import(&material::file("debian-next.raw"), "next");
    host.set_channel(CHANNEL, "next");
    let waiting = ("first".to_owned(), Some("next".to_owned()));
    for name in ["oak", "elm"] {
        assert_eq!(host.versions(name), waiting, "{name}");
    }
    for machine in [&mut oak, &mut elm] {
        machine.vm.pause(Duration::from_secs(2));
        assert_eq!(machine.look(), "1 1", "{}: paused", machine.name);
    }
    for (machine, relay) in [(&mut oak, of_oak), (&mut elm, of_elm)] {
        let connections = relay.connections();
        relay.cut();
        wait_until("QEMU to connect again", NEWS_LIMIT, || relay.connections() > connections);
        assert_eq!(machine.look(), "1 1", "{}: connected again", machine.name);
    }
    for name in ["oak", "elm"] {
        assert_eq!(host.versions(name), waiting, "{name}");
    }

    // A boot changes what may change, and leaves alone what has writes of its own over the image.
    for machine in [&mut ash, &mut oak, &mut elm] {
        machine.reboot();
    }
    assert_eq!(ash.system(), "1 1 2");
    assert_eq!(oak.system(), "2 2 none");
    assert_eq!(elm.system(), "2 2 1", "what it wrote went with the image");
    for name in ["oak", "elm"] {
        assert_eq!(host.versions(name), ("next".to_owned(), None), "{name}");
    }
    let volume = host.volume("ash");
    assert_eq!((&volume["image"]["versions"][0], &volume["needs_rebuild"]), (&"first".into(), &true.into()));
    assert_eq!(volume["target"]["versions"][0], "next", "{volume}");
    assert!(volume["behind"].as_array().is_some_and(|behind| !behind.is_empty()), "{volume}");
    assert_eq!(host.channel(CHANNEL)["volumes_behind"], 1);
    ash.power_off();
    host.detach("ash");

    // Back again; and a channel that moves when the boot loader runs finds that boot decided.
    host.roll_back(CHANNEL);
    assert_eq!(host.channel(CHANNEL)["volumes_behind"], 2, "these two are on the other image now");
    for machine in [&mut oak, &mut elm] {
        let started = machine.vm.boot_loaders();
        machine.reboot();
        machine.vm.wait_for_boot_loader(started + 1);
    }
    host.set_channel(CHANNEL, "next");
    assert_eq!(oak.system(), "1 1 none");
    assert_eq!(elm.system(), "1 1 1");
    for name in ["oak", "elm"] {
        assert_eq!(host.versions(name), waiting, "{name}");
    }
    // Pulled by the host this time.
    for machine in [&mut oak, &mut elm] {
        machine.vm.reset();
    }
    assert_eq!(oak.system(), "2 2 none");
    assert_eq!(elm.system(), "2 2 1");
    for machine in [oak, elm] {
        let name = machine.name;
        machine.power_off();
        host.detach(name);
    }
}

#[test]
fn a_guest_sees_its_disk_grow() {
    const MIB: u64 = 1 << 20;
    let dir = directory();
    let host = Host::start(dir.path());
    let image = Image::noise(dir.path(), 16, "grow");
    host.import(Path::new(image.path()), "noise");
    host.set_channel(CHANNEL, "noise");
    host.create("fir", CHANNEL, &["cow"]);
    let socket = host.attach("fir");
    let script = "
        bytes() { echo $(($(cat /sys/block/vda/size) * 512)); }
        sum=$(sha256sum </dev/vda)
        say before $(bytes)
        until [ $(bytes) -gt 16777216 ]; do usleep 50000; done
        say after $(bytes)
        [ \"$(dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum)\" = \"$sum\" ]
        echo beyond | dd of=/dev/vda bs=512 seek=65535 conv=notrunc,fsync
        echo 3 >/proc/sys/vm/drop_caches
        say read $(dd if=/dev/vda bs=512 skip=65535 count=1 | head -n 1)
    ";
    let mut vm = Vm::start_on(dir.path(), "fir", Guest::Tiny, 1, &[&socket], script);
    assert_eq!(vm.hear("before", 1), (16 * MIB).to_string());
    host.grow("fir", "32M");
    let said = vm.finish();
    assert_eq!(said.one("after"), (32 * MIB).to_string());
    assert_eq!(said.one("read"), "beyond");
    host.detach("fir");
}
