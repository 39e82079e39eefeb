//! A file that calls itself an image, mostly qcow2 with tables that may say anything: importing it ends in an image whose contents
//! are what its name says, or in an error, and leaves nothing else, whatever the file holds.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::store::{Source, Store};
use pando::sys::buffers::Readable;
use pando::sys::file;

const DISK_BYTES_MAX: u64 = 256 << 10;
const FILE_BYTES_MAX: u64 = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let bytes = if choices.sometimes() { any_file(&mut choices) } else { qcow2_file(&mut choices) };
    let source = unnamed_file();
    file::write_at(&source, &[Readable::from_slice(&bytes)], 0).unwrap();

    let root = Root::create();
    let store = Store::open(&root.0).unwrap().with_bytes_max(DISK_BYTES_MAX);
    let never = AtomicBool::new(false);
    if let Ok(imported) = store.import(Source::file(source, "fuzz"), &|_| (), &never, |_| Ok(())) {
        assert!(imported.bytes <= DISK_BYTES_MAX && imported.bytes.is_multiple_of(512) && imported.bytes > 0);
        store.open_image(&imported.digest, Some(imported.bytes)).unwrap();
        store.verify(&imported.digest, &|_| (), &never).unwrap();
        store.remove(&imported.digest).unwrap();
    }
    assert_eq!(std::fs::read_dir(root.0.join("images")).unwrap().count(), 0, "nothing is left");
});

/// A directory that is gone afterwards, in memory where that is possible.
struct Root(PathBuf);

impl Root {
    fn create() -> Root {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let root = parent.join(format!("pando-fuzz-{}", std::process::id()));
        // What a run that failed left, whose number has come again.
        let _ = std::fs::remove_dir_all(&root);
        Root(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn any_file(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut bytes = vec![0; choices.below(4096) as usize];
    choices.fill(&mut bytes);
    bytes
}

/// A header, an L1 table, L2 tables and data, in clusters of their own, of which some numbers are broken.
fn qcow2_file(choices: &mut Choices<'_>) -> Vec<u8> {
    let version = choices.one_of(&[3u32, 2]);
    let extended = version == 3 && choices.sometimes();
    let cluster_bits = if extended { 14 } else { choices.one_of(&[9u32, 10, 12]) };
    let cluster = 1u64 << cluster_bits;
    let disk_bytes = (1 + choices.below(64)) * 512;
    let table_span = cluster * cluster / if extended { 16 } else { 8 };
    let l1_entries = disk_bytes.div_ceil(table_span);
    let mut file = vec![0; 3 * cluster as usize];
    put32(&mut file, 0, 0x5146_49fb);
    put32(&mut file, 4, version);
    put32(&mut file, 20, cluster_bits);
    put64(&mut file, 24, disk_bytes);
    put32(&mut file, 36, l1_entries as u32);
    put64(&mut file, 40, cluster);
    put64(&mut file, 48, 2 * cluster);
    put32(&mut file, 56, 1);
    if version == 3 {
        put64(&mut file, 72, if extended { 1 << 4 } else { 0 });
        put32(&mut file, 96, 4);
        put32(&mut file, 100, 104);
    }
    for entry in 0..l1_entries.min(cluster / 8) {
        if choices.sometimes() {
            continue;
        }
        let l2_at = add_cluster(&mut file, cluster);
        put64(&mut file, (cluster + entry * 8) as usize, l2_at as u64 | 1 << 63);
        for index in 0..choices.below(8) {
            let step = if extended { 16 } else { 8 };
            let at = l2_at + (index * step) as usize;
            let word = l2_entry(choices, &mut file, cluster_bits);
            put64(&mut file, at, word);
            if extended {
                let bits = choices.one_of(&[0xffff_ffff, 0xffff_ffff << 32, 0xff00_0000_00ff, 0, u64::MAX]);
                put64(&mut file, at + 8, bits);
            }
        }
    }
    while choices.sometimes() {
        // Any byte, but mostly one of the header or of a table.
        let end = choices.one_of(&[104, 512, 4 * cluster]).min(file.len() as u64);
        let at = choices.below(end) as usize;
        file[at] = choices.one_of(&[0xff, 0, 0x80, 1]) ^ choices.any::<u8>();
    }
    if choices.sometimes() {
        file.truncate(choices.below(file.len() as u64) as usize);
    }
    file
}

fn l2_entry(choices: &mut Choices<'_>, file: &mut Vec<u8>, cluster_bits: u32) -> u64 {
    let cluster = 1u64 << cluster_bits;
    match choices.below(5) {
        0 if (file.len() as u64) < FILE_BYTES_MAX => {
            let at = add_cluster(file, cluster);
            choices.fill(&mut file[at..at + 64]);
            at as u64 | 1 << 63
        }
        1 if (file.len() as u64) < FILE_BYTES_MAX => {
            let at = add_cluster(file, 2 * cluster);
            // One block of deflate, stored as it is: its last, its length, the length's complement.
            let len = (cluster as u16).to_le_bytes();
            file[at..at + 5].copy_from_slice(&[1, len[0], len[1], !len[0], !len[1]]);
            if choices.sometimes() {
                choices.fill(&mut file[at..at + 16]);
            }
            let sectors = if choices.sometimes() { choices.below(16) } else { cluster / 512 };
            1 << 62 | (sectors << (62 - (cluster_bits - 8))) & ((1 << 62) - 1) | at as u64
        }
        2 => 1,
        3 => choices.below(file.len() as u64 / cluster + 2) << cluster_bits,
        4 => choices.any(),
        _ => 0,
    }
}

/// Where a new cluster of zeros starts.
fn add_cluster(file: &mut Vec<u8>, bytes: u64) -> usize {
    let at = file.len();
    file.resize(at + bytes as usize, 0);
    at
}

fn put32(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
