//! Delta files that somebody has tampered with: nothing panics, hangs or takes memory without end.

use pando::block::delta::OpenError;
use pando::block::delta::check::check;
use pando::block::delta::repair::repair;
use pando::block::delta::survey::Survey;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::disk::{CLUSTER, Disk, wait_unlocked};

/// Looks at the file in every way.
fn look(disk: &Disk) -> Result<(), OpenError> {
    check(&disk.delta())?;
    let survey = Survey::of(&disk.delta())?;
    let census = survey.census()?;
    let layout = survey.header().layout;
    assert_eq!(census.delta + census.zero + census.base + census.unknown, layout.cluster_count());
    let mut end = 0;
    survey.extents(|extent| {
        assert_eq!(extent.start, end);
        end += extent.len;
        Ok::<_, OpenError>(())
    })?;
    assert_eq!(end, layout.virtual_bytes());
    Ok(())
}

/// Writes a checksum that fits, so that what lies behind it is looked at too.
fn seal_header(disk: &Disk) {
    let header = disk.bytes_at("vm.delta", 0, 104);
    disk.scribble(&crc32c::crc32c(&header).to_le_bytes(), 104);
}

#[test]
fn any_bytes_are_looked_at_and_repaired_without_a_panic() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut looked, mut refused) = (0, 0);
    for _ in 0..150 {
        let disk = Disk::new(20 * CLUSTER, 20_000 * CLUSTER);
        let session = disk.session();
        for _ in 0..random.random_range(0..20) {
            session.write(random.random_range(0..20_000) * CLUSTER, &[5; 1024]);
            if random.random_ratio(1, 4) {
                session.flush();
            }
        }
        if random.random_bool(0.5) {
            session.close();
        } else {
            session.kill();
        }
        let layout = disk.header.layout;
        for _ in 0..random.random_range(1..4) {
            let noise: Vec<u8> = (0..random.random_range(1..16)).map(|_| random.random()).collect();
            match random.random_range(0..6) {
                // The header's numbers: cluster size, features, sizes, base.
                0 => {
                    let field = [12, 16, 48, 56, 64][random.random_range(0..5)];
                    let number = [0, 1, 512, 4096, 1 << 20, 1 << 40, 1 << 56, u64::MAX][random.random_range(0..8)];
                    disk.scribble(&number.to_le_bytes(), field);
                    seal_header(&disk);
                }
                1 => disk.scribble(&noise, 512 + random.random_range(0..64)),
                2 => disk.scribble(&noise, 4096 + random.random_range(0..512)),
                3 => disk.scribble(&noise, layout.map_block(random.random_range(0..2)) + random.random_range(0..4096)),
                4 => disk.set_len(random.random_range(0..=layout.file_bytes() + 10_000)),
                _ => disk.scribble(&noise, random.random_range(0..layout.file_bytes())),
            }
        }
        match look(&disk) {
            Ok(()) => looked += 1,
            Err(_) => refused += 1,
        }
        if let Ok((_, report)) = repair(&disk.delta()) {
            wait_unlocked(&disk.delta());
            let again = check(&disk.delta()).unwrap();
            assert_eq!(again.findings, report.findings, "the report is about what is left");
        }
    }
    assert!(looked > 20 && refused > 20, "both ways are taken: {looked} {refused}");
}
