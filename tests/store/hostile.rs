//! Files that lie: truncated, with numbers that cannot be, or mutated at random. All end in an answer, and leave nothing.

use std::process::Command;

use pando::store::{Fault, StoreError};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Site, chain, digest_of, have, patchy, run};

const CLUSTER: usize = 64 << 10;

/// A qcow2 file of a disk, and the disk.
fn sample(site: &Site, seed: u64, options: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let disk = patchy(seed, 2 << 20);
    let path = site.path("sample.qcow2");
    let raw = site.write("sample.raw", &disk);
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).args([&raw, &path]));
    (std::fs::read(path).unwrap(), disk)
}

/// Why `bytes` are refused.
#[track_caller]
fn fault(site: &Site, bytes: &[u8]) -> Fault {
    let error = site.import(&site.write("lying.qcow2", bytes), None).unwrap_err();
    site.holds(&[]);
    assert!(chain(&error).contains("lying.qcow2"));
    match error {
        StoreError::Qcow2 { fault, .. } => fault,
        error => panic!("{}", chain(&error)),
    }
}

#[test]
fn numbers_that_cannot_be_are_named() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let (good, _) = sample(&site, 1, &[]);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let fault = |bytes: &[u8]| fault(&site, bytes);
    let l1_at = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2_at = (u64::from_be_bytes(good[l1_at..l1_at + 8].try_into().unwrap()) & !(1 << 63)) as usize;
    let far = (1u64 << 50).to_be_bytes();

    assert!(matches!(fault(&good[..50]), Fault::Truncated { what: "header", .. }));
    assert!(matches!(fault(&with(4, &[0, 0, 0, 9])), Fault::Number { what: "version", found: 9, .. }));
    for bits in [0, 8, 22, 63, 64, 255] {
        assert!(matches!(fault(&with(20, &[0, 0, 0, bits])), Fault::Number { .. }), "{bits}");
    }
    assert!(matches!(fault(&with(32, &[0, 0, 0, 1])), Fault::Encrypted));
    assert!(matches!(fault(&with(36, &[0xff; 4])), Fault::Number { .. }), "L1 entries");
    assert!(matches!(fault(&with(36, &[0; 4])), Fault::ShortTable { found: 0, expected: 1 }));
    assert!(matches!(fault(&with(40, &far)), Fault::Truncated { what: "L1 table", .. }));
    assert!(matches!(fault(&with(40, &[0xff; 8])), Fault::Unaligned { what: "L1 table", .. }));
    assert!(matches!(fault(&with(48, &far)), Fault::Truncated { what: "refcount table", .. }));
    assert!(matches!(fault(&with(56, &[0xff; 4])), Fault::Truncated { what: "refcount table", .. }));
    assert!(matches!(fault(&with(72, &[0x80])), Fault::Features { .. }));
    assert!(matches!(fault(&with(79, &[2])), Fault::MarkedCorrupt));
    assert!(matches!(fault(&with(96, &[0, 0, 0, 7])), Fault::Number { .. }), "refcount width");
    assert!(matches!(fault(&with(100, &[0xff; 4])), Fault::Number { what: "header length", .. }));
    assert!(matches!(fault(&with(l1_at, &far)), Fault::Truncated { what: "L2 table", .. }));
    assert!(matches!(fault(&with(l1_at + 6, &[2])), Fault::Unaligned { what: "L2 table", .. }));
    assert!(matches!(fault(&with(l2_at, &far)), Fault::Truncated { what: "data", .. }));
    assert!(matches!(fault(&with(l2_at + 6, &[2])), Fault::Unaligned { what: "data cluster", .. }));
    assert!(matches!(fault(&with(l2_at, &[0x3f])), Fault::Entry { offset: 0, .. }), "reserved bits");

    for (size, expected) in [(1u64 << 62, "too large"), (0, "no size"), (1025, "no size")] {
        let path = site.write("lying.qcow2", &with(24, &size.to_be_bytes()));
        let error = site.import(&path, None).unwrap_err();
        let found = match error {
            StoreError::TooLarge { .. } => "too large",
            StoreError::BadSize { .. } => "no size",
            error => panic!("{}", chain(&error)),
        };
        assert_eq!(found, expected, "{size}");
    }
    site.holds(&[]);
}

#[test]
fn a_file_that_was_cut_off_is_refused_wherever_that_was() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let (good, disk) = sample(&site, 2, &[]);
    let data_end = good.len() - CLUSTER / 2;
    for end in [60, 100, 4096, CLUSTER, 2 * CLUSTER, 3 * CLUSTER + 4, 4 * CLUSTER, 5 * CLUSTER + 512, data_end] {
        assert!(matches!(fault(&site, &good[..end]), Fault::Truncated { .. }), "{end}");
    }
    assert_eq!(site.import(&site.write("whole.qcow2", &good), None).unwrap().digest, digest_of(&disk));
}

#[test]
fn compressed_clusters_that_are_damaged_are_refused() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let (good, _) = sample(&site, 3, &["-c"]);
    let mut bytes = good.clone();
    // All that was packed, but for the tables ahead of it.
    let start = 5 * CLUSTER;
    bytes[start..].fill(0xff);
    assert!(matches!(fault(&site, &bytes), Fault::Compressed { .. }));
    bytes.truncate(start);
    assert!(matches!(fault(&site, &bytes), Fault::Entry { .. } | Fault::Truncated { .. } | Fault::Compressed { .. }));
}

#[test]
fn mutated_files_never_panic_and_leave_nothing() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let store = site.store.clone().with_bytes_max(16 << 20);
    let mut samples: Vec<Vec<u8>> =
        [&[][..], &["-c"], &["-o", "compat=0.10"], &["-o", "extended_l2=on,cluster_size=16k"]]
            .iter()
            .map(|options| sample(&site, 4, options).0)
            .collect();
    for kind in ["monolithicSparse", "streamOptimized"] {
        let path = site.path("sample.vmdk");
        let option = format!("subformat={kind}");
        run(Command::new("qemu-img")
            .args(["convert", "-O", "vmdk", "-o", &option, "-f", "raw"])
            .args([&site.path("sample.raw"), &path]));
        samples.push(std::fs::read(path).unwrap());
    }
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..600 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = samples[random.random_range(0..samples.len())].clone();
        for _ in 0..random.random_range(1..6) {
            // The header, the first words of any of the first clusters, or anything.
            let at = match random.random_range(0..4) {
                0 | 1 => random.random_range(0..112),
                2 => random.random_range(0..6) * CLUSTER + random.random_range(0..64),
                _ => random.random_range(0..bytes.len()),
            };
            let byte = match random.random_range(0..3) {
                0 => 0xff,
                1 => bytes[at] ^ 1 << random.random_range(0..8),
                _ => random.random(),
            };
            // The mark stays, so that it is taken as what it was.
            if (4..bytes.len()).contains(&at) {
                bytes[at] = byte;
            }
        }
        if random.random_range(0..4) == 0 {
            bytes.truncate(random.random_range(0..bytes.len()));
        }
        let path = site.write("mutated", &bytes);
        match super::import(&store, &path, None) {
            Ok(imported) => {
                taken += 1;
                site.holds(&[imported.digest]);
                store.remove(&imported.digest).unwrap();
            }
            Err(error) => {
                refused += 1;
                assert!(chain(&error).contains("mutated"), "seed {seed}: {}", chain(&error));
                site.holds(&[]);
            }
        }
    }
    assert!(refused > 100 && taken > 20, "{refused} refused, {taken} taken");
}
