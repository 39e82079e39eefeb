//! What the processes of a host say to each other, as bytes that another build, or nobody in his right mind, may have sent: they are a message or
//! an error, nothing panics, a few bytes never become many, no descriptor stays open, and what is sent arrives as it was.
#![no_main]

use std::fmt::Debug;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::LazyLock;

use fuzz_targets::{Choices, open_descriptors};
use libfuzzer_sys::fuzz_target;
use pando::sys::guest::RegionPlace;
use pando::sys::socket::PacketSocket;
use pando::vhost_user::control::{self, Command, Controllers, Event, Reply, Report, Said, Serve, VolumeSpec};
use pando::vhost_user::conversation::{Conversation, MESSAGE_BYTES_MAX};
use pando::vhost_user::handover::State;
use pando::vhost_user::inflight::RegionShape;
use pando::vhost_user::order::{
    Answer, DeltaOrder, LogPlace, Opened, Order, REGIONS_MAX, RingOrder, RingRun, RingStop, SessionOrder, VolumeOrder,
};
use pando::vhost_user::ring::RingPlace;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What every message begins with.
const VERSION: u32 = 1;

static NULL: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").unwrap());

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    LazyLock::force(&NULL);
    let before = open_descriptors();
    match choices.below(5) {
        4 => hand_over(&mut choices),
        0 => exchange(&mut choices, random_order),
        1 => exchange(&mut choices, random_answer),
        2 => exchange(&mut choices, random_command),
        _ => exchange(&mut choices, random_said),
    }
    assert_eq!(open_descriptors(), before, "a descriptor stays open");
});

/// Reads the state of a keeper, of either version, with some bytes changed, or cut off.
fn hand_over(choices: &mut Choices<'_>) {
    let frozen: [&[u8]; 2] = [
        include_bytes!("../../../../tests/frozen/keeper-state-3"),
        include_bytes!("../../../../tests/frozen/keeper-state-4"),
    ];
    let mut bytes = frozen[choices.below(2) as usize].to_vec();
    for _ in 0..choices.below(8) {
        let at = choices.below(bytes.len() as u64) as usize;
        bytes[at] = choices.any();
    }
    bytes.truncate(bytes.len() - choices.below(4) as usize * choices.below(64) as usize);
    if let Ok(state) = State::decode(&bytes) {
        let again = State::decode(&state.encode().expect("what was read can be said")).expect("and read");
        assert_eq!(again, state);
    }
}

/// Says something, whole or broken, and hears it at the other end.
fn exchange<M: Serialize + DeserializeOwned + Debug>(choices: &mut Choices<'_>, make: fn(&mut Choices<'_>) -> M) {
    let (ours, theirs) = PacketSocket::pair().unwrap();
    let descriptors = [NULL.as_fd(); 8];
    let descriptors = &descriptors[..choices.below(8) as usize];
    if choices.below(2) == 0 {
        let message = make(choices);
        Conversation::over(ours, "fuzzer").send(&message, descriptors).unwrap();
        let receiver = Conversation::over(theirs, "fuzzer");
        let (heard, found) = receiver.receive::<M>().expect("what is sent can be read");
        assert_eq!(encode(&heard), encode(&message), "{message:?} arrives as {heard:?}");
        assert_eq!(found.len(), descriptors.len());
        assert!(receiver.receive::<M>().is_err(), "there is no more");
        return;
    }
    let bytes = random_bytes(choices, make);
    let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    if ours.send(&bytes, &numbers).is_err() {
        // More than a socket takes at once.
        assert!(bytes.len() > MESSAGE_BYTES_MAX);
        return;
    }
    if choices.below(2) == 0 {
        return hear_as_keeper(theirs, ours);
    }
    let receiver = Conversation::over(theirs, "fuzzer");
    match receiver.receive::<M>() {
        Err(error) => assert!(!error.to_string().is_empty() && !error.would_block()),
        Ok((heard, _)) => {
            let again: M = postcard::from_bytes(&encode(&heard)).expect("what was read can be said");
            assert_eq!(encode(&again), encode(&heard));
        }
    }
}

/// Takes a packet as a keeper takes it from a controller.
fn hear_as_keeper(theirs: PacketSocket, ours: PacketSocket) {
    let null = OwnedFd::from(NULL.try_clone().unwrap());
    let mut controllers = Controllers::new(Conversation::over(theirs, "controller"), null.into()).unwrap();
    if let Some((command, mut descriptors)) = controllers.receive() {
        let volume = match command {
            Command::Serve(Serve { volume, .. }) | Command::Stage(volume) => volume,
            _ => return,
        };
        let (has_base, has_delta) = (volume.base.is_some(), volume.delta.is_some());
        if let Ok(part) = control::take_volume(volume, &mut descriptors) {
            assert_eq!((part.base.is_some(), part.delta.is_some()), (has_base, has_delta));
        }
    }
    drop(ours);
    assert!(controllers.receive().is_none());
    controllers.say(&Said::Reply(Reply::Done), &[]);
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).unwrap()
}

fn random_bytes<M: Serialize>(choices: &mut Choices<'_>, make: fn(&mut Choices<'_>) -> M) -> Vec<u8> {
    let version = if choices.rarely() { choices.any() } else { VERSION };
    let mut bytes = if choices.below(2) == 0 {
        encode(&(version, make(choices)))
    } else {
        let mut bytes = vec![0; choices.below(256) as usize];
        choices.fill(&mut bytes);
        [encode(&version), bytes].concat()
    };
    for _ in 0..choices.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = choices.below(bytes.len() as u64) as usize;
        bytes[at] = choices.one_of(&[0xff, 0x80, 0x7f, 0]) ^ choices.any::<u8>();
    }
    if choices.sometimes() {
        bytes.truncate(choices.below(bytes.len() as u64 + 1) as usize);
    }
    if choices.sometimes() {
        // As much as there can be, or a little more.
        let last = bytes.last().copied().unwrap_or(0xff);
        bytes.resize(MESSAGE_BYTES_MAX - 8 + choices.below(16) as usize, last);
    }
    if bytes.is_empty() { vec![0] } else { bytes }
}

fn list<T>(choices: &mut Choices<'_>, mut make: impl FnMut(&mut Choices<'_>) -> T) -> Vec<T> {
    let count = if choices.rarely() { REGIONS_MAX as u64 } else { choices.below(4) };
    (0..count).map(|_| make(choices)).collect()
}

fn maybe<T>(choices: &mut Choices<'_>, make: impl FnOnce(&mut Choices<'_>) -> T) -> Option<T> {
    (choices.below(2) == 1).then(|| make(choices))
}

fn text(choices: &mut Choices<'_>) -> String {
    let mut bytes = vec![0; choices.below(40) as usize];
    choices.fill(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn flag(choices: &mut Choices<'_>) -> bool {
    choices.below(2) == 1
}

fn delta(choices: &mut Choices<'_>) -> DeltaOrder {
    DeltaOrder { label: text(choices), ephemeral: flag(choices) }
}

fn region(choices: &mut Choices<'_>) -> RegionPlace {
    RegionPlace {
        guest_address: choices.any(),
        user_address: choices.any(),
        bytes: choices.any(),
        file_offset: choices.any(),
    }
}

fn place(choices: &mut Choices<'_>) -> RingPlace {
    RingPlace { size: choices.any(), descriptors: choices.any(), available: choices.any(), used: choices.any() }
}

fn shape(choices: &mut Choices<'_>) -> RegionShape {
    RegionShape { offset: choices.any(), bytes: choices.any(), slots: choices.any(), ring_size: choices.any() }
}

fn ring(choices: &mut Choices<'_>) -> RingOrder {
    let run = maybe(choices, |choices| RingRun {
        place: place(choices),
        next_available: maybe(choices, |choices| choices.any()),
        used_in_log: maybe(choices, |choices| choices.any()),
        has_call: flag(choices),
        has_error: flag(choices),
    });
    RingOrder { index: choices.any(), run }
}

fn random_order(choices: &mut Choices<'_>) -> Order {
    match choices.below(5) {
        0 => Order::Open(VolumeOrder {
            base: maybe(choices, text),
            delta: maybe(choices, delta),
            direct: flag(choices),
            queues: choices.any(),
            serial: maybe(choices, |choices| choices.any()),
            hold_ms: choices.any(),
            kernel_rings: None,
            poll_us: choices.any(),
            log_level: choices.any(),
            boot: choices.any(),
        }),
        1 => Order::Become(SessionOrder {
            features: choices.any(),
            writeback: flag(choices),
            memory: maybe(choices, |choices| list(choices, region)),
            inflight: maybe(choices, shape),
            log: maybe(choices, |choices| LogPlace { offset: choices.any(), bytes: choices.any() }),
            rings: list(choices, ring),
        }),
        2 => Order::Look(list(choices, place)),
        3 => Order::Hello,
        _ => Order::Close,
    }
}

fn random_answer(choices: &mut Choices<'_>) -> Answer {
    match choices.below(4) {
        0 => Answer::Opened(Opened {
            bytes: choices.any(),
            read_only: flag(choices),
            cluster_bytes: choices.any(),
            serial: choices.any(),
        }),
        1 => Answer::Done(list(choices, |choices| RingStop {
            index: choices.any(),
            next_available: choices.any(),
            held: choices.any(),
        })),
        2 => Answer::Looked(list(choices, |choices| maybe(choices, |choices| choices.any()))),
        _ => Answer::Failed(text(choices)),
    }
}

fn volume(choices: &mut Choices<'_>) -> VolumeSpec {
    VolumeSpec {
        tag: text(choices),
        base: maybe(choices, text),
        delta: maybe(choices, delta),
        serial: maybe(choices, |choices| choices.any()),
        direct: flag(choices),
    }
}

fn random_command(choices: &mut Choices<'_>) -> Command {
    match choices.below(8) {
        0 => Command::Serve(Serve {
            volume: volume(choices),
            queues: choices.any(),
            ring_size_max: choices.any(),
            log_level: choices.any(),
            name: text(choices),
            resumed: flag(choices),
            hold_ms: choices.any(),
            poll_us: choices.any(),
            kernel_from_vmm: flag(choices),
        }),
        1 => Command::Report,
        2 => Command::Stage(volume(choices)),
        3 => Command::Unstage,
        4 => Command::Resume,
        5 => Command::Grow { bytes: choices.any() },
        6 => Command::Upgrade,
        _ => Command::Stop,
    }
}

fn random_said(choices: &mut Choices<'_>) -> Said {
    if choices.below(3) == 0 {
        return Said::Reply(match choices.below(3) {
            0 => Reply::Report(Report {
                process: choices.any(),
                name: text(choices),
                tag: text(choices),
                staged: maybe(choices, text),
                bytes: choices.any(),
                connected: flag(choices),
                held: flag(choices),
                version: text(choices),
            }),
            1 => Reply::Done,
            _ => Reply::Failed(text(choices)),
        });
    }
    Said::Event(match choices.below(11) {
        0 => Event::Connected,
        1 => Event::Disconnected { reason: text(choices) },
        2 => Event::Switched { tag: text(choices), bytes: choices.any() },
        3 => Event::SwitchFailed { tag: text(choices), reason: text(choices) },
        4 => Event::WorkerDied { status: text(choices) },
        5 => Event::WorkerHeld { seconds: choices.any() },
        6 => Event::WorkerResumed,
        7 => Event::Full { held: choices.any() },
        8 => Event::SpaceBack,
        9 => Event::LowSpace { bytes: choices.any() },
        _ => Event::Latched { file: text(choices) },
    })
}
