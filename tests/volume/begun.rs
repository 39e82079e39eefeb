//! Writes whose bytes somebody else moves: what may happen beside them, and what they are when they never arrive.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pando::block::base::Base;
use pando::block::delta::open::{self, NewDelta};
use pando::block::delta::{Delta, Lifetime};
use pando::block::storage::FileStorage;
use pando::block::{Batch, Begun, BegunWrite, Error, Volume, VolumeFile};
use pando::sys::buffers::{Readable, Writable};
use pando::sys::file;
use pando::units::ClusterSize;

const CLUSTER: usize = 4096;
const BYTES: usize = 8 << 20;
const BASE: u8 = 0xba;
const PATIENCE: Duration = Duration::from_secs(60);

fn volume() -> Arc<Volume> {
    let new = NewDelta { base: None, virtual_bytes: Some(BYTES as u64), cluster: ClusterSize::DEFAULT };
    let (delta, header) = open::create_unnamed(&std::env::temp_dir(), &new).unwrap();
    let storage = FileStorage::new(delta).unwrap();
    let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).unwrap();
    let base = tempfile::tempfile().unwrap();
    file::write_at(&base, &[Readable::from_slice(&[BASE; BYTES])], 0).unwrap();
    Arc::new(Volume::cow(Base::map(&base, "base".to_owned()).unwrap(), delta))
}

fn read(volume: &Volume, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![1; len];
    volume.read(offset as u64, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
    bytes
}

fn write(volume: &Volume, offset: usize, bytes: &[u8]) {
    let mut batch = Batch::default();
    volume.write(offset as u64, &[Readable::from_slice(bytes)], &mut batch).unwrap();
    volume.commit(&mut batch).unwrap();
}

fn begin<'m>(volume: &Arc<Volume>, offset: usize, bytes: &'m [u8]) -> Option<Begun<'m>> {
    BegunWrite::new(volume, offset as u64, &[Readable::from_slice(bytes)]).unwrap()
}

/// Does what the kernel would, and then what a queue does.
fn arrive(volume: &Volume, (begun, places): Begun<'_>) {
    for place in &places {
        file::write_at(volume.file(place.file).unwrap(), &place.buffers, place.offset).unwrap();
    }
    let mut batch = Batch::default();
    begun.finish(&mut batch);
    volume.commit(&mut batch).unwrap();
}

#[test]
fn whole_clusters_are_written_wherever_they_lie() {
    let volume = volume();
    // Over the end of a stretch, and a second time where the delta has them.
    for (number, offset) in [0, 255 * CLUSTER, 255 * CLUSTER].into_iter().enumerate() {
        let bytes = vec![number as u8; 600 * CLUSTER];
        let begun = begin(&volume, offset, &bytes).unwrap();
        assert!(begun.1.iter().all(|place| place.file == VolumeFile::Delta));
        assert_eq!(begun.1.iter().map(|place| place.len).sum::<u64>(), bytes.len() as u64);
        arrive(&volume, begun);
        assert!(read(&volume, offset, bytes.len()) == bytes, "write {number}");
    }
    assert!(read(&volume, 855 * CLUSTER, CLUSTER) == [BASE; CLUSTER]);
}

#[test]
fn what_is_not_whole_is_not_begun_unless_the_delta_has_the_rest() {
    let volume = volume();
    let bytes = [7; 3 * CLUSTER];
    assert!(begin(&volume, 512, &bytes[..512]).is_none());
    assert!(begin(&volume, 512, &bytes).is_none(), "both ends");
    assert!(begin(&volume, CLUSTER, &bytes[..CLUSTER + 512]).is_none(), "one of them");
    write(&volume, 0, &[1; CLUSTER]);
    write(&volume, 3 * CLUSTER, &[3; CLUSTER]);
    let begun = begin(&volume, 512, &bytes).unwrap();
    arrive(&volume, begun);
    let expected = [vec![1; 512], vec![7; 3 * CLUSTER], vec![3; CLUSTER - 512]].concat();
    assert!(read(&volume, 0, 4 * CLUSTER) == expected);
    // Nothing keeps whoever is next away.
    volume.discard(0, BYTES as u64).unwrap();
    assert!(begin(&volume, 512, &bytes).is_none(), "what was discarded is not held");
    let outside = BegunWrite::new(&volume, BYTES as u64 - 512, &[Readable::from_slice(&bytes)]);
    assert!(matches!(outside, Err(Error::OutOfRange { .. })));
}

#[test]
fn one_that_never_arrives_was_none() {
    let volume = volume();
    let bytes = [7; CLUSTER];
    drop(begin(&volume, CLUSTER, &bytes).unwrap());
    assert!(read(&volume, 0, 3 * CLUSTER) == [BASE; 3 * CLUSTER]);
    volume.discard(0, 3 * CLUSTER as u64).unwrap();
    assert!(read(&volume, 0, 3 * CLUSTER) == [0; 3 * CLUSTER]);
}

/// Also where it keeps nobody away, because the delta had all of it.
#[test]
fn what_is_made_zero_meanwhile_does_not_come_back() {
    let volume = volume();
    // All of the first stretch is held, and nothing of the second.
    write(&volume, 0, &[1; 256 * CLUSTER]);
    let bytes = [7; 3 * CLUSTER - 1024];
    let begun = begin(&volume, 254 * CLUSTER + 1024, &bytes).unwrap();
    volume.write_zeroes(254 * CLUSTER as u64, CLUSTER as u64, false, &mut Batch::default()).unwrap();
    arrive(&volume, begun);
    assert!(read(&volume, 254 * CLUSTER, 1024) == [0; 1024]);
    assert!(read(&volume, 255 * CLUSTER, 2 * CLUSTER) == bytes[..2 * CLUSTER]);
}

/// Does something to the first cluster.
type Act = fn(&Volume);

/// A write of a sector must not fill in what is about to be written, nor a discard take it away half-way.
#[test]
fn those_that_fill_in_or_take_away_wait_for_those_that_write_all() {
    let new = [7; CLUSTER];
    let beside = [&new[..1024], &[8; 512], &new[1536..]].concat();
    let acts: [(&str, Act, Vec<u8>); 3] = [
        ("a write of a sector", |volume| write(volume, 1024, &[8; 512]), beside),
        ("a discard", |volume| volume.discard(0, CLUSTER as u64).unwrap(), vec![0; CLUSTER]),
        (
            "zeros",
            |volume| volume.write_zeroes(0, CLUSTER as u64, true, &mut Batch::default()).unwrap(),
            vec![0; CLUSTER],
        ),
    ];
    for (what, act, expected) in acts {
        let volume = volume();
        let first = begin(&volume, 0, &new).unwrap();
        let second = begin(&volume, 0, &new).unwrap();
        let (ends, end) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                act(&volume);
                ends.send(()).unwrap();
            });
            // Nobody goes ahead of one that waits, and by that it is seen to.
            let begun = Instant::now();
            while begin(&volume, 8 * CLUSTER, &new).is_some() {
                assert!(begun.elapsed() < PATIENCE && end.try_recv().is_err(), "{what} does not wait");
            }
            arrive(&volume, first);
            assert!(end.recv_timeout(Duration::from_millis(20)).is_err(), "{what} waits for one of two");
            arrive(&volume, second);
            end.recv_timeout(PATIENCE).expect("it goes on");
        });
        assert!(read(&volume, 0, CLUSTER) == expected, "{what}");
        assert!(begin(&volume, 8 * CLUSTER, &new).is_some(), "{what} is over");
    }
}
