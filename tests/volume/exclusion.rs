//! Exclusion: threads that write different sectors of the same clusters, at the same time, all win.

use std::ops::Range;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use pando::block::base::Base;
use pando::block::delta::header::{BaseIdentity, Header};
use pando::block::delta::open::{self, NewDelta};
use pando::block::delta::{Delta, Lifetime};
use pando::block::storage::FileStorage;
use pando::block::{Batch, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::units::{ClusterSize, SECTOR_BYTES};
use rand::RngExt;

use super::history::seeded;
use super::machine::base_file;
use super::stamps::Stamp;

const THREADS: u64 = 4;
const CLUSTERS: u64 = 64;
const ROUNDS: u64 = 40;

/// A new volume on real files, of `CLUSTERS` clusters over a base of as many.
fn volume() -> Volume<FileStorage> {
    let sectors = CLUSTERS * 8;
    let identity = BaseIdentity { digest: Digest([7; 32]), bytes: sectors * SECTOR_BYTES };
    let new = NewDelta { base: Some(identity), virtual_bytes: None, cluster: ClusterSize::DEFAULT };
    let (file, header): (_, Header) = open::create_unnamed(&std::env::temp_dir(), &new).unwrap();
    let storage = FileStorage::new(file).unwrap();
    let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).unwrap();
    let all = 0..sectors;
    Volume::cow(Base::map(&base_file(sectors, std::slice::from_ref(&all)), "base".into()).unwrap(), delta)
}

fn write(volume: &Volume, sectors: Range<u64>, number: u64) {
    let bytes: Vec<u8> = sectors.clone().flat_map(|sector| Stamp::new(number, sector).bytes()).collect();
    let mut batch = Batch::default();
    volume.write(sectors.start * SECTOR_BYTES, &[Readable::from_slice(&bytes)], &mut batch).unwrap();
    volume.commit(&mut batch).unwrap();
}

fn read(volume: &Volume, sector: u64) -> Option<Stamp> {
    let mut bytes = [0; SECTOR_BYTES as usize];
    volume.read(sector * SECTOR_BYTES, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
    Stamp::of(&bytes)
}

/// The sectors of a cluster that belong to a thread.
fn own(cluster: u64, thread: u64) -> Range<u64> {
    let start = cluster * 8 + thread * 2;
    start..start + 2
}

#[test]
fn threads_that_write_to_the_same_fresh_clusters_lose_nothing() {
    for round in 0..ROUNDS {
        let volume = volume();
        let barrier = Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (volume, barrier) = (&volume, &barrier);
                scope.spawn(move || {
                    for cluster in 0..CLUSTERS {
                        barrier.wait();
                        write(volume, own(cluster, thread), 2 + thread);
                    }
                });
            }
        });
        for (cluster, thread) in (0..CLUSTERS).flat_map(|cluster| (0..THREADS).map(move |thread| (cluster, thread))) {
            for sector in own(cluster, thread) {
                let expected = Some(Stamp::new(2 + thread, sector));
                assert_eq!(read(&volume, sector), expected, "cluster {cluster} in round {round}");
            }
        }
    }
}

/// The even clusters are written to, over and over; the odd ones come and go as a whole; another thread flushes; and each
/// reads, all the time, what it has written itself.
#[test]
fn among_overwrites_discards_and_flushes_nothing_is_lost() {
    for seed in 0..ROUNDS / 4 {
        let (_, _context) = seeded(seed);
        let volume = volume();
        let running = AtomicBool::new(true);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let volume = &volume;
                    scope.spawn(move || {
                        let (mut rng, _context) = seeded(seed * THREADS + thread);
                        let mut last = vec![Stamp::BASE; CLUSTERS as usize];
                        for number in 2..400 {
                            let cluster = rng.random_range(0..CLUSTERS);
                            if cluster % 2 == 0 {
                                let sector = own(cluster, thread).start;
                                let expected = Stamp::new(last[cluster as usize], sector);
                                assert_eq!(read(volume, sector), Some(expected), "sector {sector}");
                                write(volume, own(cluster, thread), number);
                                last[cluster as usize] = number;
                            } else if thread % 2 == 0 {
                                volume.discard(cluster * 4096, 4096).unwrap();
                            } else {
                                write(volume, cluster * 8..cluster * 8 + 8, number);
                            }
                        }
                        last
                    })
                })
                .collect();
            scope.spawn(|| {
                while running.load(Ordering::Relaxed) {
                    volume.flush().unwrap();
                }
            });
            let last: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
            running.store(false, Ordering::Relaxed);
            for (thread, last) in last.into_iter().enumerate() {
                let last = last.unwrap();
                for cluster in (0..CLUSTERS).step_by(2) {
                    for sector in own(cluster, thread as u64) {
                        let expected = Some(Stamp::new(last[cluster as usize], sector));
                        assert_eq!(read(&volume, sector), expected, "sector {sector}");
                    }
                }
            }
        });
    }
}

/// Who reads a cluster while it is copied up sees the base or what was written, and never what lies between.
#[test]
fn a_reader_sees_a_cluster_before_or_after() {
    for _ in 0..ROUNDS {
        let volume = volume();
        let barrier = Barrier::new(2);
        // Told at the end, so that nobody waits for a thread that is gone.
        let mut wrong = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for cluster in 0..CLUSTERS {
                    barrier.wait();
                    write(&volume, own(cluster, 1), 2);
                }
            });
            for cluster in 0..CLUSTERS {
                barrier.wait();
                for sector in (cluster * 8..cluster * 8 + 8).cycle().take(32) {
                    let found = read(&volume, sector);
                    let is_base = found == Some(Stamp::new(Stamp::BASE, sector));
                    let is_written = own(cluster, 1).contains(&sector) && found == Some(Stamp::new(2, sector));
                    if !is_base && !is_written {
                        wrong.push((sector, found));
                    }
                }
            }
        });
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

/// One thread writes to a sector of a cluster that another one makes zero: whichever is first, the cluster's other sectors
/// are zero.
#[test]
fn zeros_beside_a_write_are_not_lost() {
    for round in 0..ROUNDS {
        let volume = volume();
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for cluster in 0..CLUSTERS {
                    barrier.wait();
                    write(&volume, cluster * 8 + 3..cluster * 8 + 4, 2);
                }
            });
            for cluster in 0..CLUSTERS {
                barrier.wait();
                volume.write_zeroes(cluster * 4096, 4096, true, &mut Batch::default()).unwrap();
            }
        });
        for sector in 0..CLUSTERS * 8 {
            let found = read(&volume, sector);
            let is_written = sector % 8 == 3 && found == Some(Stamp::new(2, sector));
            assert!(is_written || found == Some(Stamp::ZERO), "sector {sector}: {found:?}, round {round}");
        }
    }
}
