//! Whether a start of the device is the first of a guest's boot: the only moment at which another image may come below it.
//!
//! A guest must never read one part of an image and another part of another. So an image changes only when the guest has forgotten all that
//! it read: at a boot, and there at the first start, before the firmware reads the boot loader, for what the firmware and the boot
//! loader have read is the kernel, whose root then has to be of the same image. Nobody tells a backend that a guest boots. What it
//! sees is how drivers start:
//!
//! - **From nothing.** A driver that goes on (a pause, a reconnect, a migration) has its rings start where they stopped. One that has
//!   forgotten has them start at 0, where the last run had come further. A ring that stopped at exactly 0, after 65536 requests, tells
//!   nothing.
//! - **Firmware or operating system.** Drivers of firmware (OVMF, SeaBIOS, rust-hypervisor-firmware) take none of the features that save
//!   work; those of operating systems take at least one.
//!
//! | driver, from nothing | after | same connection | new connection |
//! |---|---|---|---|
//! | firmware | an operating system | a boot | a boot |
//! | firmware | firmware | cannot be told: firmware starts its driver several times in one boot | a boot |
//! | operating system | firmware | the same boot, never | the same boot, or cannot be told: never |
//! | operating system | an operating system | cannot be told: kexec, or a return from suspend; a boot if the VMM loads the kernel | a boot: the VMM is another, or has reset its device as cloud-hypervisor does |
//!
//! When it cannot be told, nothing changes until the next boot that can. Pure: knows neither rings nor messages.

use virtio_bindings::{virtio_blk, virtio_ring};

/// Who drives the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Driver {
    /// Firmware or a boot loader.
    Firmware,
    /// A kernel.
    OperatingSystem,
}

/// Features that only operating systems' drivers take.
const OF_OPERATING_SYSTEMS: [u32; 6] = [
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
    virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
    virtio_blk::VIRTIO_BLK_F_MQ,
    virtio_blk::VIRTIO_BLK_F_DISCARD,
    virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES,
    virtio_blk::VIRTIO_BLK_F_CONFIG_WCE,
];

impl Driver {
    /// Who takes these features.
    pub fn of_features(features: u64) -> Driver {
        if OF_OPERATING_SYSTEMS.iter().any(|bit| features & (1 << bit) != 0) {
            Driver::OperatingSystem
        } else {
            Driver::Firmware
        }
    }
}

/// A ring, when the device starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingStart {
    /// Number of the ring.
    pub index: usize,
    /// Where it starts; `None` when nobody has said.
    pub base: Option<u16>,
    /// How far its used ring has come; `None` when it cannot be seen.
    pub used: Option<u16>,
}

/// A start of the device: no ring ran, and one is about to.
#[derive(Clone, Debug)]
pub struct Start {
    /// Who drives it.
    pub driver: Driver,
    /// Whether it is the first on this connection.
    pub new_connection: bool,
    /// The rings that have a place and take part: they are to run, or the front end has said where they start since they stopped.
    pub rings: Vec<RingStart>,
}

/// What has been seen of a volume's guest so far.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct History {
    /// Where each ring stopped last.
    stopped: Vec<Option<u16>>,
    /// Who drove the device last.
    driver: Option<Driver>,
    /// Whether a guest may have read something of which nothing is known here.
    unknown: bool,
    kernel_from_vmm: bool,
}

impl History {
    /// Nothing seen. `resumed`: a guest may be running all the same.
    pub fn new(resumed: bool, kernel_from_vmm: bool) -> History {
        History { stopped: Vec::new(), driver: None, unknown: resumed, kernel_from_vmm }
    }

    /// Notes where a ring stopped.
    pub fn stopped(&mut self, index: usize, position: u16) {
        if self.stopped.len() <= index {
            self.stopped.resize(index + 1, None);
        }
        self.stopped[index] = Some(position);
    }

    /// Notes a start, and says whether it is the first of a boot.
    pub fn start(&mut self, start: &Start) -> bool {
        let is_boot = self.is_boot(start);
        self.driver = Some(start.driver);
        is_boot
    }

    fn is_boot(&self, start: &Start) -> bool {
        let moved = |index: Option<u16>| index.is_some_and(|index| index != 0);
        if start.rings.iter().any(|ring| moved(ring.base) || moved(ring.used)) {
            // It goes on, also when it is the first that this keeper sees: a guest has come here with its memory.
            return false;
        }
        let Some(previous) = self.driver else {
            // Nobody has read anything, unless it was before this keeper's time.
            return !self.unknown;
        };
        if !self.is_from_nothing(&start.rings) {
            return false;
        }
        match (start.driver, previous) {
            (Driver::Firmware, Driver::OperatingSystem) => true,
            (Driver::Firmware, Driver::Firmware) => start.new_connection,
            (Driver::OperatingSystem, Driver::Firmware) => false,
            (Driver::OperatingSystem, Driver::OperatingSystem) => start.new_connection || self.kernel_from_vmm,
        }
    }

    fn is_from_nothing(&self, rings: &[RingStart]) -> bool {
        let starts_at_nothing = |ring: &RingStart| ring.base == Some(0) && ring.used == Some(0);
        let had_come_further =
            |ring: &RingStart| self.stopped.get(ring.index).copied().flatten().is_some_and(|position| position != 0);
        rings.iter().all(starts_at_nothing) && rings.iter().any(had_come_further)
    }
}

#[cfg(test)]
mod tests {
    use super::Driver::{Firmware, OperatingSystem};
    use super::*;

    fn start(driver: Driver, new_connection: bool, base: u16) -> Start {
        let rings = vec![RingStart { index: 0, base: Some(base), used: Some(base) }];
        Start { driver, new_connection, rings }
    }

    /// Each step: who starts, on a new connection or not, from where, where it stops, and whether that is a boot.
    fn check(mut history: History, steps: &[(Driver, bool, u16, u16, bool)]) {
        for (number, &(driver, new_connection, base, stops, expected)) in steps.iter().enumerate() {
            assert_eq!(history.start(&start(driver, new_connection, base)), expected, "step {number} of {steps:?}");
            history.stopped(0, stops);
        }
    }

    #[test]
    fn the_first_start_of_a_new_volume_is_one_and_of_a_resumed_one_is_not() {
        check(History::new(false, false), &[(Firmware, true, 0, 9, true)]);
        check(History::new(true, false), &[(Firmware, true, 0, 9, false), (OperatingSystem, false, 0, 40, false)]);
    }

    #[test]
    fn a_guest_that_comes_from_elsewhere_goes_on() {
        check(History::new(false, false), &[(OperatingSystem, true, 5, 9, false), (Firmware, false, 0, 9, true)]);
    }

    #[test]
    fn boots_by_firmware() {
        check(
            History::new(false, false),
            &[
                (Firmware, true, 0, 9, true),
                (OperatingSystem, false, 0, 700, false),
                (Firmware, false, 0, 9, true),
                (OperatingSystem, false, 0, 800, false),
                // Stopped in the boot loader and reset: cannot be told, until the next one can.
                (Firmware, false, 0, 9, true),
                (Firmware, false, 0, 9, false),
                (OperatingSystem, false, 0, 800, false),
                (Firmware, false, 0, 9, true),
            ],
        );
    }

    #[test]
    fn pauses_and_reconnects_are_none() {
        check(
            History::new(false, false),
            &[
                (Firmware, true, 0, 9, true),
                (OperatingSystem, false, 0, 700, false),
                (OperatingSystem, false, 700, 900, false),
                (OperatingSystem, true, 900, 950, false),
                // Paused at the very wrap of the index.
                (OperatingSystem, false, 950, 0, false),
                (OperatingSystem, true, 0, 10, false),
                (Firmware, false, 0, 3, true),
                (Firmware, false, 3, 9, false),
            ],
        );
    }

    #[test]
    fn kernels_that_start_over_are_one_when_that_can_be_told() {
        let steps = |expected| [(OperatingSystem, true, 0, 700, true), (OperatingSystem, false, 0, 700, expected)];
        check(History::new(false, false), &steps(false));
        check(History::new(false, true), &steps(true));
        check(
            History::new(false, false),
            &[(OperatingSystem, true, 0, 700, true), (OperatingSystem, true, 0, 9, true)],
        );
        check(History::new(false, true), &[(Firmware, true, 0, 7, true), (OperatingSystem, true, 0, 9, false)]);
    }

    #[test]
    fn rings_have_to_agree() {
        let mut history = History::new(false, false);
        history.start(&start(OperatingSystem, true, 0));
        history.stopped(0, 0);
        history.stopped(1, 5);
        let ring = |index, base, used| RingStart { index, base, used };
        let of = |rings| Start { driver: Firmware, new_connection: false, rings };
        for (rings, expected) in [
            (vec![ring(0, Some(0), Some(0)), ring(1, Some(0), Some(0))], true),
            (vec![ring(0, Some(0), Some(0)), ring(1, Some(5), Some(5))], false),
            (vec![ring(0, Some(0), Some(0)), ring(1, Some(0), Some(5))], false),
            (vec![ring(0, Some(0), Some(0)), ring(1, None, Some(0))], false),
            (vec![ring(0, Some(0), Some(0)), ring(1, Some(0), None)], false),
            (vec![ring(0, Some(0), Some(0))], false),
        ] {
            assert_eq!(history.is_boot(&of(rings.clone())), expected, "{rings:?}");
        }
    }

    #[test]
    fn drivers_are_told_by_what_they_take() {
        let bits = |bits: &[u32]| bits.iter().fold(0u64, |features, bit| features | 1 << bit);
        // OVMF: FLUSH, RO, BLK_SIZE, TOPOLOGY, VERSION_1.
        assert_eq!(Driver::of_features(bits(&[5, 6, 9, 10, 32, 30])), Firmware);
        assert_eq!(Driver::of_features(0), Firmware);
        assert_eq!(Driver::of_features(bits(&[28, 32])), OperatingSystem);
        assert_eq!(Driver::of_features(bits(&[29])), OperatingSystem);
    }
}
