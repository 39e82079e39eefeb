//! A slot that keeps account of what is in flight. One that holds anything is taken over or refused, and nothing panics. One that only our own
//! code has written, by workers of whom any may die between any two steps, never loses a request and never gives one back that was completed.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, LazyLock};

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::sys::buffers::Readable;
use pando::sys::file;
use pando::sys::guest::{GuestMemory, RegionPlace, SharedArea};
use pando::vhost_user::inflight::{Inflight, Recovered, RegionShape};
use pando::vhost_user::steps::{self, Death, Step};

/// Descriptors of the largest ring, and the slots that there are for it.
const SIZE_MAX: u16 = 256;
const SLOTS: u16 = 2;
/// Steps of one input.
const STEPS_MAX: usize = 400;

/// Where an account can be interrupted.
const STEPS: [Step; 9] = [
    Step::TakeFlag,
    Step::TakeNumber,
    Step::CompleteBefore,
    Step::CompleteLast,
    Step::ShownClear,
    Step::ShownUsed,
    Step::RecoverClear,
    Step::RecoverUsed,
    Step::Begin,
];

struct World {
    file: File,
    memory: Arc<GuestMemory>,
    shape: RegionShape,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let shape = RegionShape::new(SLOTS, SIZE_MAX);
    let file = unnamed_file();
    file.set_len(shape.bytes).unwrap();
    let place = RegionPlace { guest_address: 0, user_address: 0, bytes: shape.bytes, file_offset: 0 };
    let memory = Arc::new(GuestMemory::map(vec![(place, file.try_clone().unwrap())]).unwrap());
    World { file, memory, shape }
});

/// Where a ring's account is kept.
fn slot(index: u16, size: u16) -> SharedArea {
    let (at, len) = WORLD.shape.slot(index, size).expect("it has one");
    WORLD.memory.area(at, len, 8).expect("it lies in the region")
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    steps::unwind_at(Step::Begin, 0);
    match choices.below(4) {
        0 => check_shape(&mut choices),
        1 => run_over_anything(&mut choices),
        _ => Model::new(&mut choices).run(&mut choices),
    }
});

/// A region's numbers are refused, or every slot lies in it.
fn check_shape(choices: &mut Choices<'_>) {
    let mut shape = RegionShape::new(choices.below(300) as u16, 1 << choices.below(16));
    for number in [&mut shape.offset, &mut shape.bytes] {
        if choices.sometimes() {
            *number = if choices.below(2) == 0 {
                choices.any()
            } else {
                number.wrapping_add(choices.below(130)).wrapping_sub(65)
            };
        }
    }
    if choices.sometimes() {
        (shape.slots, shape.ring_size) = (choices.any(), choices.any());
    }
    match shape.check() {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(()) => {
            for index in [0, shape.slots / 2, shape.slots - 1, shape.slots, choices.any()] {
                for size in [1, shape.ring_size, choices.any()] {
                    match shape.slot(index, size) {
                        Ok((at, len)) => {
                            assert!(at + len as u64 <= shape.bytes, "a slot ends outside");
                            assert!(index < shape.slots && size <= shape.ring_size);
                        }
                        Err(error) => assert!(index >= shape.slots || size > shape.ring_size, "{error}"),
                    }
                }
            }
        }
    }
}

/// A slot that somebody else has written: it is refused, or what it says of the past can be.
fn run_over_anything(choices: &mut Choices<'_>) {
    let size = if choices.rarely() { 1 + choices.below(SIZE_MAX.into()) as u16 } else { 1 << choices.below(9) };
    let index = choices.below(SLOTS.into()) as u16;
    let used: u16 = choices.any();
    write_anything(choices, index, size, used);
    for _ in 0..4 {
        let used = if choices.sometimes() { choices.any() } else { used };
        let (mut inflight, recovered) = match Inflight::start(slot(index, size), size, used, choices.any()) {
            Ok(started) => started,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let mut heads = recovered.in_flight;
        assert!(heads.len() <= usize::from(size) && heads.iter().all(|head| *head < size));
        heads.sort_unstable();
        heads.dedup();
        let mut used = used;
        for _ in 0..choices.below(32) {
            let head = choices.below(size.into()) as u16;
            match choices.below(3) {
                0 => assert!(!inflight.take(head) || !heads.contains(&head)),
                1 => inflight.complete(head),
                _ => {
                    used = used.wrapping_add(choices.below(4) as u16);
                    inflight.shown(used);
                    heads.clear();
                }
            }
        }
    }
}

fn write_anything(choices: &mut Choices<'_>, index: u16, size: u16, used: u16) {
    let (at, len) = WORLD.shape.slot(index, size).expect("it has one");
    let mut bytes = vec![0; len];
    let mut put16 = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    put16(0, choices.below(3) as u16);
    put16(8, if choices.rarely() { choices.any() } else { 1 });
    put16(10, if choices.rarely() { choices.any() } else { size });
    put16(12, if choices.sometimes() { choices.any() } else { choices.below(size.into()) as u16 });
    put16(14, if choices.sometimes() { choices.any() } else { used.wrapping_sub(choices.below(9) as u16) });
    for head in 0..usize::from(size.min(32)) {
        let entry = 16 + head * 16;
        put16(entry, choices.one_of(&[0, 1, 1, 0x100, 0xffff]));
        put16(entry + 6, if choices.sometimes() { choices.any() } else { choices.below(size.into()) as u16 });
        put16(entry + 8, if choices.sometimes() { choices.any() } else { choices.below(8) as u16 });
    }
    if choices.sometimes() {
        // The high bytes of the features and of a number of taking.
        let at = choices.one_of(&[2, 7, 31, 40]).min(len - 1);
        bytes[at] = choices.any();
    }
    file::write_at(&WORLD.file, &[Readable::from_slice(&bytes)], at).unwrap();
}

/// A driver, the used index that it sees, and workers one after another.
struct Model {
    size: u16,
    /// What the driver has offered and no worker has taken, the next one first.
    offered: VecDeque<u16>,
    /// Taken and not shown as complete, in the order of taking.
    taken: Vec<u16>,
    /// Those of them that this worker has completed.
    complete: Vec<u16>,
    /// Free for the driver to use.
    free: Vec<u16>,
    /// Index of the next entry of the available ring to take.
    next_available: u16,
    /// What is written into the used ring's index.
    used: u16,
    worker: Option<Inflight>,
    /// Whether a worker has taken the slot over before.
    is_begun: bool,
}

impl Model {
    fn new(choices: &mut Choices<'_>) -> Model {
        let size = 1 << choices.below(6);
        WORLD.shape.clear(&WORLD.file, 0).unwrap();
        let used: u16 = choices.any();
        // Odd front ends have the one index ahead of the other from the start.
        let next_available = if choices.sometimes() { choices.any() } else { used };
        Model {
            size,
            offered: VecDeque::new(),
            taken: Vec::new(),
            complete: Vec::new(),
            free: (0..size).collect(),
            next_available,
            used,
            worker: None,
            is_begun: false,
        }
    }

    fn run(mut self, choices: &mut Choices<'_>) {
        for _ in 0..STEPS_MAX {
            if choices.is_over() {
                break;
            }
            if choices.below(8) == 7 {
                let step = choices.one_of(&STEPS);
                steps::unwind_at(step, 1 + choices.below(3));
            }
            let lives = match self.worker.take() {
                None => self.start(),
                Some(worker) => self.work(worker, choices),
            };
            if !lives || choices.sometimes() {
                // Whoever comes next knows what is in memory, and no more.
                self.worker = None;
                self.complete.clear();
                steps::unwind_at(Step::Begin, 0);
            }
        }
        steps::unwind_at(Step::Begin, 0);
        self.worker = None;
        self.complete.clear();
        self.start();
    }

    /// A worker takes the slot over. Whether it lives.
    fn start(&mut self) -> bool {
        let (size, used, next_available) = (self.size, self.used, self.next_available);
        // Of a slot that was used, the slot knows better.
        let hint = if self.is_begun { !next_available } else { next_available };
        let started = survive(|| Inflight::start(slot(0, size), size, used, hint));
        let Some(started) = started else { return false };
        let (inflight, Recovered { next_available, in_flight }) = started.expect("only our code has written it");
        assert_eq!(in_flight, self.taken, "what was taken and not shown is in flight, in order");
        assert_eq!(next_available, self.next_available, "and nothing is taken twice or left out");
        self.worker = Some(inflight);
        self.is_begun = true;
        true
    }

    /// One step of a worker. Whether it lives.
    fn work(&mut self, mut worker: Inflight, choices: &mut Choices<'_>) -> bool {
        let lives = match choices.below(4) {
            0 => {
                let count = choices.below(4).min(self.free.len() as u64);
                for _ in 0..count {
                    let at = choices.below(self.free.len() as u64) as usize;
                    self.offered.push_back(self.free.swap_remove(at));
                }
                true
            }
            1 => self.take(&mut worker, choices),
            2 => self.complete(&mut worker, choices),
            _ => self.show(&mut worker, choices),
        };
        self.worker = Some(worker);
        lives
    }

    fn take(&mut self, worker: &mut Inflight, choices: &mut Choices<'_>) -> bool {
        if let Some(head) = self.taken.first().filter(|_| choices.sometimes()) {
            // A driver that names a request again that it has not got back.
            assert!(!worker.take(*head));
            return true;
        }
        let Some(head) = self.offered.front().copied() else { return true };
        let result = survive(|| worker.take(head));
        // Where a death came in between, the flag in memory says whether it was taken.
        if result == Some(true) || result.is_none() && is_in_flight(head) {
            self.offered.pop_front();
            self.taken.push(head);
            self.next_available = self.next_available.wrapping_add(1);
        }
        assert_ne!(result, Some(false), "it was not in flight");
        result.is_some()
    }

    fn complete(&mut self, worker: &mut Inflight, choices: &mut Choices<'_>) -> bool {
        let open: Vec<u16> = self.taken.iter().copied().filter(|head| !self.complete.contains(head)).collect();
        if open.is_empty() {
            return true;
        }
        let head = choices.one_of(&open);
        let lives = survive(|| worker.complete(head)).is_some();
        self.complete.push(head);
        lives
    }

    /// Shows what is complete: one store of the used index, and then the account of it.
    fn show(&mut self, worker: &mut Inflight, choices: &mut Choices<'_>) -> bool {
        if self.complete.is_empty() {
            return true;
        }
        for head in std::mem::take(&mut self.complete) {
            self.used = self.used.wrapping_add(1);
            self.taken.retain(|taken| *taken != head);
            self.free.push(head);
        }
        let used = self.used;
        // A death may come in between.
        !choices.sometimes() && survive(|| worker.shown(used)).is_some()
    }
}

/// Whether a head is marked as in flight, as the documentation of the slot has it.
fn is_in_flight(head: u16) -> bool {
    slot(0, SIZE_MAX).read::<8>(16 + usize::from(head) * 16)[0] != 0
}

/// Runs what may die; `None` when it has.
fn survive<T>(work: impl FnOnce() -> T) -> Option<T> {
    match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Some(result),
        Err(cause) if cause.is::<Death>() => None,
        Err(cause) => panic::resume_unwind(cause),
    }
}
