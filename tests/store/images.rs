//! Raw images: importing, spooling, listing, verifying, removing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use pando::digest::Digest;
use pando::store::{Format, Progress, Source, Store, StoreError};

use super::{Site, chain, digest_of, patchy};

static NEVER: AtomicBool = AtomicBool::new(false);

#[test]
fn a_raw_image_is_there_once_and_read_only() {
    let site = Site::new();
    let disk = patchy(1, (5 << 20) + 512);
    let path = site.write("disk.raw", &disk);
    let seen = Mutex::new(Vec::new());
    let source = Source::file(File::open(&path).unwrap(), "disk.raw");
    let imported =
        site.store.import(source, &|progress| seen.lock().unwrap().push(progress), &NEVER, |_| Ok(())).unwrap();
    assert_eq!(imported.digest, digest_of(&disk));
    assert_eq!((imported.bytes, imported.format, imported.was_there), (disk.len() as u64, Format::Raw, false));
    let total_bytes = disk.len() as u64;
    assert!(seen.into_inner().unwrap().contains(&Progress { done_bytes: total_bytes, total_bytes }));

    let stored = site.store.path(&imported.digest);
    assert!(std::fs::read(&stored).unwrap() == disk);
    assert_eq!(std::fs::metadata(&stored).unwrap().permissions().mode() & 0o7777, 0o444);
    for directory in [stored.parent().unwrap(), stored.parent().unwrap().parent().unwrap()] {
        assert_eq!(std::fs::metadata(directory).unwrap().permissions().mode() & 0o7777, 0o700);
    }
    let inode = std::fs::metadata(&stored).unwrap().ino();
    let again = site.import(&path, None).unwrap();
    assert!(again.was_there && again.digest == imported.digest && again.stored_bytes == imported.stored_bytes);
    assert_eq!(std::fs::metadata(&stored).unwrap().ino(), inode, "it is still the same file");
    site.holds(&[imported.digest]);
    site.store.verify(&imported.digest, &|_| (), &NEVER).unwrap();
    assert_eq!(site.store.stored_bytes(&imported.digest).unwrap(), imported.stored_bytes);
}

#[test]
fn holes_and_zeros_take_no_space() {
    let site = Site::new();
    let path = site.path("sparse.raw");
    let mut file = File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    file.seek(SeekFrom::Start(40 << 20)).unwrap();
    file.write_all(&[7; 8192]).unwrap();
    // Written zeros, not a hole.
    file.write_all(&vec![0; 8 << 20]).unwrap();
    let imported = site.import(&path, None).unwrap();
    assert_eq!(imported.bytes, 64 << 20);
    assert!(imported.stored_bytes < 128 << 10, "{} bytes", imported.stored_bytes);
    let mut disk = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut disk).unwrap();
    assert_eq!(imported.digest, digest_of(&disk));
}

#[test]
fn a_spooled_image_is_the_file_that_it_was_spooled_to() {
    let site = Site::new();
    let disk = patchy(2, (3 << 20) + 512 * 7);
    let mut disk = disk;
    // Ends in zeros, which nothing is written for.
    let end = disk.len();
    disk[end - 10_000..].fill(0);
    let mut spool = site.store.spool().unwrap();
    for (index, piece) in disk.chunks(100_003).enumerate() {
        spool.write(piece).unwrap();
        assert_eq!(spool.bytes(), ((index + 1) * 100_003).min(disk.len()) as u64);
    }
    site.holds(&[]);
    let source = Source::spooled(spool.finish().unwrap(), "standard input");
    let imported = site.store.import(source, &|_| (), &NEVER, |_| Ok(())).unwrap();
    assert_eq!(imported.digest, digest_of(&disk));
    assert!(!imported.was_there);
    site.holds(&[imported.digest]);
    let mode = std::fs::metadata(site.store.path(&imported.digest)).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o444);

    let mut spool = site.store.spool().unwrap();
    spool.write(&disk).unwrap();
    let source = Source::spooled(spool.finish().unwrap(), "standard input");
    assert!(site.store.import(source, &|_| (), &NEVER, |_| Ok(())).unwrap().was_there);

    site.store.spool().unwrap().write(&disk).unwrap();
    site.holds(&[imported.digest]);
}

#[test]
fn sizes_that_no_disk_has_are_refused() {
    let site = Site::new();
    for bytes in [0, 1, 511, 513, (1 << 20) + 100] {
        let error = site.import(&site.write("odd.raw", &vec![1; bytes]), None).unwrap_err();
        assert!(matches!(error, StoreError::BadSize { found, .. } if found == bytes as u64), "{error}");
        assert!(chain(&error).contains("512") && chain(&error).contains("odd.raw"), "{error}");
    }
    let path = site.path("huge.raw");
    File::create(&path).unwrap().set_len((1 << 20) + 512).unwrap();
    let small = site.store.clone().with_bytes_max(1 << 20);
    let error = super::import(&small, &path, None).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { limit, .. } if limit == 1 << 20), "{error}");
    let mut spool = small.spool().unwrap();
    assert!(matches!(spool.write(&vec![1; (1 << 20) + 1]), Err(StoreError::TooLarge { .. })));
    site.holds(&[]);
}

#[test]
fn only_regular_files_are_read() {
    let site = Site::new();
    for path in ["/dev/zero", "/proc/self", "/dev/null"] {
        let error = site.import(path.as_ref(), None).unwrap_err();
        assert!(matches!(error, StoreError::NotAFile { .. }), "{error}");
    }
}

#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
    let site = Site::new();
    let path = site.write("disk.raw", &patchy(3, 8 << 20));
    let change = |_| {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    };
    let source = Source::file(File::open(&path).unwrap(), "disk.raw");
    match site.store.import(source, &change, &NEVER, |_| Ok(())) {
        Err(error) => {
            assert!(matches!(error, StoreError::Changed { .. }), "{error}");
            site.holds(&[]);
        }
        // Where the file system shares blocks, it is a copy from the first moment on, and what comes later does not matter.
        Ok(imported) => site.store.verify(&imported.digest, &|_| (), &NEVER).unwrap(),
    }
}

#[test]
fn cancelled_work_leaves_nothing() {
    let site = Site::new();
    let path = site.write("disk.raw", &patchy(4, 32 << 20));
    let cancelled = AtomicBool::new(false);
    let cancel = |progress: Progress| {
        if progress.done_bytes > 4 << 20 {
            cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let source = || Source::file(File::open(&path).unwrap(), "disk.raw");
    assert!(matches!(site.store.import(source(), &cancel, &cancelled, |_| Ok(())), Err(StoreError::Cancelled)));
    site.holds(&[]);
    let imported = site.store.import(source(), &|_| (), &NEVER, |_| Ok(())).unwrap();
    let always = AtomicBool::new(true);
    assert!(matches!(site.store.verify(&imported.digest, &|_| (), &always), Err(StoreError::Cancelled)));
}

#[test]
fn what_is_stored_is_checked_against_its_name() {
    let site = Site::new();
    let disk = patchy(5, 3 << 20);
    let imported = site.import(&site.write("disk.raw", &disk), None).unwrap();
    let stored = site.store.path(&imported.digest);
    if imported.verity {
        println!("skipped: the file system does not let an image be damaged (fs-verity)");
        return;
    }
    std::fs::set_permissions(&stored, PermissionsExt::from_mode(0o600)).unwrap();
    let mut file = File::options().write(true).open(&stored).unwrap();
    file.seek(SeekFrom::Start(1_234_567)).unwrap();
    file.write_all(&[disk[1_234_567] ^ 1]).unwrap();
    let error = site.store.verify(&imported.digest, &|_| (), &NEVER).unwrap_err();
    let StoreError::Corrupt { path, expected, found } = &error else { panic!("{error}") };
    assert_eq!((path, expected), (&stored, &imported.digest));
    for part in [stored.display().to_string(), expected.to_string(), found.to_string()] {
        assert!(chain(&error).contains(&part));
    }
    file.set_len(1 << 20).unwrap();
    let error = site.import(&site.path("disk.raw"), None).unwrap_err();
    assert!(matches!(error, StoreError::WrongLength { expected: 3_145_728, found: 1_048_576, .. }), "{error}");
    site.store.remove(&imported.digest).unwrap();
    assert!(!site.import(&site.path("disk.raw"), None).unwrap().was_there);
}

#[test]
fn the_list_has_images_and_tells_of_the_rest() {
    let site = Site::new();
    let first = site.import(&site.write("1", &[1; 512]), None).unwrap().digest;
    let second = site.import(&site.write("2", &[2; 512]), None).unwrap().digest;
    let images = site.store.path(&first).parent().unwrap().to_owned();
    let upper = format!("{}.raw", first.to_string().to_uppercase());
    for name in ["notes.txt", &upper, ".incoming-1"] {
        std::fs::write(images.join(name), b"x").unwrap();
    }
    let listing = site.store.digests().unwrap();
    let mut expected = vec![first, second];
    expected.sort_by_key(|digest| digest.0);
    assert_eq!(listing.images, expected);
    let mut foreign: Vec<std::ffi::OsString> = vec![upper.into(), "notes.txt".into()];
    foreign.sort();
    assert_eq!(listing.foreign, foreign);

    // Opened anew, it is without what a dead process left.
    let store = Store::open(images.parent().unwrap()).unwrap();
    assert!(!images.join(".incoming-1").exists() && images.join("notes.txt").exists());
    assert_eq!(store.digests().unwrap(), listing);

    site.store.remove(&first).unwrap();
    assert_eq!(site.store.digests().unwrap().images, [second]);
    let absent = [site.store.remove(&first).unwrap_err(), site.store.open_image(&first, None).unwrap_err()];
    for error in absent {
        assert!(matches!(error, StoreError::Absent { digest, .. } if digest == first), "{error}");
    }
    assert!(matches!(site.store.open_image(&second, Some(1024)), Err(StoreError::WrongLength { .. })));
    site.store.open_image(&second, Some(512)).unwrap();
    assert!(site.store.verify(&Digest([0; 32]), &|_| (), &NEVER).is_err());
}
