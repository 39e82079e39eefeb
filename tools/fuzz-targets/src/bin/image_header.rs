//! A file that calls itself an image, mostly qcow2 or VMDK with tables that may say anything, sparse or cut off: importing it, from a file or as
//! an upload, ends in an image whose contents are what its name says, or in an error, and leaves nothing else, whatever the file holds.
#![no_main]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::store::{Format, Source, Store};
use pando::sys::buffers::Readable;
use pando::sys::file;

const DISK_BYTES_MAX: u64 = 256 << 10;
const FILE_BYTES_MAX: u64 = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let bytes = match choices.below(8) {
        0..4 => qcow2_file(&mut choices),
        4..7 => vmdk_file(&mut choices),
        _ => any_file(&mut choices),
    };
    let root = Root::create();
    let store = Store::open(&root.0).unwrap().with_bytes_max(DISK_BYTES_MAX);
    let never = AtomicBool::new(false);
    let format = choices.one_of(&[None, None, None, Some(Format::Raw), Some(Format::Qcow2), Some(Format::Vmdk)]);
    let is_upload = choices.sometimes();
    let source = || {
        let source = if is_upload {
            let mut spool = store.spool().unwrap();
            bytes.chunks(1000).for_each(|piece| spool.write(piece).unwrap());
            Source::spooled(spool.finish().unwrap(), "fuzz")
        } else {
            Source::file(sparse_file(&bytes), "fuzz")
        };
        source.with_format(format)
    };
    match store.import(source(), &|_| (), &never, |_| Ok(())) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(imported) => {
            assert!(imported.bytes <= DISK_BYTES_MAX && imported.bytes.is_multiple_of(512) && imported.bytes > 0);
            assert!(format.is_none_or(|format| format == imported.format));
            store.open_image(&imported.digest, Some(imported.bytes)).unwrap();
            store.verify(&imported.digest, &|_| (), &never).unwrap();
            let again =
                store.import(source(), &|_| (), &never, |_| Ok(())).expect("what was taken once is taken again");
            assert!(again.digest == imported.digest && again.was_there);
            store.remove(&imported.digest).unwrap();
        }
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

/// A file with these bytes, and holes where there are many zeros.
fn sparse_file(bytes: &[u8]) -> File {
    let source = unnamed_file();
    source.set_len(bytes.len() as u64).unwrap();
    for (at, block) in
        (0..).step_by(4096).zip(bytes.chunks(4096)).filter(|(_, block)| block.iter().any(|byte| *byte != 0))
    {
        file::write_at(&source, &[Readable::from_slice(block)], at).unwrap();
    }
    source
}

/// Marks of formats that are told and not read, and where they stand.
const MARKS: [(usize, &[u8]); 8] = [
    (0, b""),
    (0, b"KDMV"),
    (0, b"QFI\xfb\0\0\0\x02"),
    (0, b"vhdxfile"),
    (0x40, b"\x7f\x10\xda\xbe"),
    (257, b"ustar"),
    (0, b"\x1f\x8b\x08"),
    (0, b"# Disk DescriptorFile"),
];

/// Mostly a raw disk: whole sectors, of anything.
fn any_file(choices: &mut Choices<'_>) -> Vec<u8> {
    let sectors = choices.below(20) * choices.one_of(&[1, 16]);
    let mut bytes = vec![choices.any(); sectors as usize * 512 + if choices.sometimes() { 1 } else { 0 }];
    let len = bytes.len().min(600);
    choices.fill(&mut bytes[..len]);
    let (at, mark) = choices.one_of(&MARKS);
    if let Some(place) = bytes.get_mut(at..at + mark.len()) {
        place.copy_from_slice(mark);
    }
    if choices.sometimes() && bytes.len() >= 512 {
        let last = bytes.len() - 512;
        bytes[last..last + 8].copy_from_slice(b"conectix");
    }
    bytes
}

/// A header, a description, a grain directory, grain tables and grains, of which some numbers are broken.
fn vmdk_file(choices: &mut Choices<'_>) -> Vec<u8> {
    let is_compressed = choices.below(2) == 1;
    let is_at_end = is_compressed && choices.below(2) == 1;
    let has_zeroed = choices.below(2) == 1;
    let grain_sectors = choices.one_of(&[8u64, 1, 2, 16, 64]);
    let sectors_max = if choices.sometimes() { 500 } else { 64 };
    let sectors = 1 + choices.below(sectors_max);
    let kind = if is_compressed { "streamOptimized" } else { "monolithicSparse" };
    let kind = if choices.rarely() { choices.one_of(&["twoGbMaxExtentSparse", "", "vmfs"]) } else { kind };
    let parent = if choices.rarely() { "12345678" } else { "ffffffff" };
    let text = format!("# Disk DescriptorFile\nversion=1\nparentCID={parent}\ncreateType=\"{kind}\"\n");
    let mut file = vec![0; 3 * 512];
    file[512..512 + text.len()].copy_from_slice(text.as_bytes());

    let tables = sectors.div_ceil(grain_sectors * 512);
    let directory = file.len() / 512;
    add_cluster(&mut file, 512);
    for table in 0..tables.min(4) {
        let at = add_cluster(&mut file, 512 * 4);
        put_le(&mut file, directory * 512 + table as usize * 4, at as u64 / 512, 4);
        for entry in 0..choices.below(12).min(sectors.div_ceil(grain_sectors)) {
            let value = match choices.below(8) {
                0 => 0,
                1 => 1,
                2 => choices.any::<u32>().into(),
                3 => choices.below(file.len() as u64 / 512 + 2),
                _ if (file.len() as u64) < FILE_BYTES_MAX => {
                    add_grain(choices, &mut file, is_compressed, entry, grain_sectors)
                }
                _ => 0,
            };
            put_le(&mut file, at + entry as usize * 4, value, 4);
        }
    }
    let flags = 3 | u64::from(has_zeroed) << 2 | if is_compressed { 3 << 16 } else { 0 };
    let mut header = vec![0; 512];
    header[..4].copy_from_slice(b"KDMV");
    for (at, value, len) in [
        (4, choices.one_of(&[1, 2, 3]), 4),
        (8, flags, 4),
        (12, sectors, 8),
        (20, grain_sectors, 8),
        (28, 1, 8),
        (36, 2, 8),
        (44, 512, 4),
        (56, directory as u64, 8),
        (77, u64::from(is_compressed), 2),
    ] {
        put_le(&mut header, at, value, len);
    }
    while choices.rarely() {
        let at = choices.one_of(&[4, 8, 10, 12, 20, 28, 36, 44, 56, 77]);
        header[at] = choices.any();
    }
    file[..512].copy_from_slice(&header);
    if is_at_end {
        // The first header says that there is another, ahead of the last sector.
        put_le(&mut file, 56, u64::MAX, 8);
        file.extend(header);
        add_cluster(&mut file, 512);
    }
    if choices.sometimes() {
        file.truncate(choices.below(file.len() as u64) as usize);
    }
    file
}

/// Puts a grain behind what there is, and gives its sector.
fn add_grain(
    choices: &mut Choices<'_>,
    file: &mut Vec<u8>,
    is_compressed: bool,
    entry: u64,
    grain_sectors: u64,
) -> u64 {
    let bytes = grain_sectors as usize * 512;
    let at = add_cluster(file, bytes as u64 + if is_compressed { 512 } else { 0 });
    if !is_compressed {
        choices.fill(&mut file[at..at + 64]);
        return at as u64 / 512;
    }
    put_le(file, at, entry * grain_sectors, 8);
    // As zlib has it: two bytes of its own, one block of deflate that is stored as it is, and a sum over that.
    let content = choices.any::<u8>();
    let len = (bytes as u16).to_le_bytes();
    let mut packed = vec![0x78, 0x01, 1, len[0], len[1], !len[0], !len[1]];
    packed.extend(vec![content; bytes]);
    let sum = packed[7..].iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    packed.extend((sum.1 << 16 | sum.0).to_be_bytes());
    if choices.sometimes() {
        let at = choices.below(16) as usize;
        packed[at] = choices.any();
    }
    let said = if choices.rarely() { choices.any::<u32>().into() } else { packed.len() as u64 };
    put_le(file, at + 8, said, 4);
    let room = (file.len() - at - 12).min(packed.len());
    file[at + 12..at + 12 + room].copy_from_slice(&packed[..room]);
    at as u64 / 512
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

fn put_le(file: &mut [u8], at: usize, value: u64, len: usize) {
    file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

fn put32(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
