//! Formats, as `qemu-img` writes them: the disk that QEMU sees is the image, and what is not all of a disk is refused.

use std::path::{Path, PathBuf};
use std::process::Command;

use pando::store::{Fault, Format, StoreError};

use super::{Site, chain, digest_of, have, patchy, run};

/// Turns a raw disk into another format; `options` go to `qemu-img convert`.
fn convert(site: &Site, raw: &Path, options: &[&str]) -> PathBuf {
    let path = site.path("converted");
    run(Command::new("qemu-img").arg("convert").args(["-f", "raw"]).args(options).args([raw, &path]));
    path
}

#[test]
fn qcow2_of_all_kinds_gives_the_disk_that_was_put_in() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let kinds: &[&[&str]] = &[
        &[],
        &["-c"],
        &["-o", "compat=0.10"],
        &["-c", "-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=4096"],
        &["-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M"],
        &["-o", "preallocation=metadata"],
        &["-o", "preallocation=full"],
        &["-o", "extended_l2=on,cluster_size=16k"],
        &["-o", "extended_l2=on"],
        &["-c", "-o", "extended_l2=on"],
        &["-o", "lazy_refcounts=on,refcount_bits=1"],
    ];
    for (seed, kind) in kinds.iter().enumerate() {
        let disk = patchy(seed as u64, (9 << 20) + 512 * 7);
        let raw = site.write("disk.raw", &disk);
        let path = convert(&site, &raw, &[&["-O", "qcow2"], *kind].concat());
        let imported = site.import(&path, None).unwrap_or_else(|error| panic!("{kind:?}: {}", chain(&error)));
        assert_eq!(imported.digest, digest_of(&disk), "{kind:?}");
        assert_eq!((imported.format, imported.bytes), (Format::Qcow2, disk.len() as u64));
        assert!(site.import(&raw, None).unwrap().was_there, "{kind:?}");
        site.holds(&[imported.digest]);
        site.store.remove(&imported.digest).unwrap();
    }
}

#[test]
fn vmdk_in_one_file_gives_the_disk_that_was_put_in() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    for (seed, kind) in ["monolithicSparse", "streamOptimized"].into_iter().enumerate() {
        for (bytes, zeroed) in [(70 << 20, "on"), ((9 << 20) + 512 * 7, "off")] {
            let disk = patchy(seed as u64, bytes);
            let options = format!("subformat={kind},zeroed_grain={zeroed}");
            let path = convert(&site, &site.write("disk.raw", &disk), &["-O", "vmdk", "-o", &options]);
            let imported = site.import(&path, None).unwrap_or_else(|error| panic!("{kind}: {}", chain(&error)));
            let mut whole = disk;
            whole.resize(imported.bytes as usize, 0);
            assert!(imported.bytes >= bytes as u64 && imported.bytes < bytes as u64 + (64 << 10), "{}", imported.bytes);
            assert_eq!((imported.digest, imported.format), (digest_of(&whole), Format::Vmdk), "{kind}");
            site.store.remove(&imported.digest).unwrap();

            // Cut off anywhere, it is refused or gives nothing but what was put in.
            let file = std::fs::read(&path).unwrap();
            for cut in [3, 511, 600, 1024, file.len() / 2, file.len() - 512] {
                match site.import(&site.write("cut.vmdk", &file[..cut]), None) {
                    Ok(imported) => {
                        assert_eq!(imported.digest, digest_of(&whole), "{cut}");
                        site.store.remove(&imported.digest).unwrap();
                    }
                    Err(error) => assert!(chain(&error).contains("cut.vmdk"), "{cut}: {}", chain(&error)),
                }
            }
            site.holds(&[]);
        }
    }
    // Over a parent, or in several files.
    let parent = site.path("parent.vmdk");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vmdk"]).arg(&parent).arg("4M"));
    let child = site.path("child.vmdk");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b"]).args([&parent, &child]));
    let error = site.import(&child, None).unwrap_err();
    assert!(matches!(error, StoreError::Refers { what: "parent", .. }), "{}", chain(&error));
    let split = site.path("split.vmdk");
    let options = ["-o", "subformat=twoGbMaxExtentSparse"];
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vmdk"]).args(options).arg(&split).arg("4M"));
    for path in [split, site.path("split-s001.vmdk")] {
        let error = chain(&site.import(&path, None).unwrap_err());
        assert!(error.contains("several files") || error.contains("in other files"), "{error}");
    }
}

#[test]
fn qcow2_that_a_guest_wrote_to_gives_what_the_guest_sees() {
    if !have("qemu-io") {
        return;
    }
    let site = Site::new();
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on", "cluster_size=64k,lazy_refcounts=on"] {
        let path = site.path("written.qcow2");
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("20M"));
        // Parts of clusters, zeros over data, discards, compressed clusters, an odd end.
        let commands = [
            "write -P 1 4k 2k",
            "write -P 2 100k 300k",
            "write -z 128k 70k",
            "write -c -P 3 1M 64k",
            "write -P 4 1030k 6k",
            "discard 200k 64k",
            "write -z -u 320k 10k",
            "write -P 5 20479k 1k",
        ];
        let commands = commands.iter().flat_map(|command| ["-c", *command]);
        run(Command::new("qemu-io").args(["-f", "qcow2"]).args(commands).arg(&path));
        // A state of the past, and something after it.
        run(Command::new("qemu-img").args(["snapshot", "-c", "past"]).arg(&path));
        run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 6 110k 3k"]).arg(&path));
        let raw = site.path("seen.raw");
        run(Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&path, &raw]));
        let imported = site.import(&path, Some(Format::Qcow2)).unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(imported.digest, digest_of(&std::fs::read(&raw).unwrap()), "{options}");
        assert!(imported.stored_bytes < 1 << 20, "{} bytes", imported.stored_bytes);
        site.store.remove(&imported.digest).unwrap();
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_spooled_qcow2_is_converted() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let disk = patchy(1, 3 << 20);
    let path = convert(&site, &site.write("disk.raw", &disk), &["-O", "qcow2", "-c"]);
    let mut spool = site.store.spool().unwrap();
    spool.write(&std::fs::read(path).unwrap()).unwrap();
    let source = pando::store::Source::spooled(spool.finish().unwrap(), "upload");
    let imported = site.store.import(source, &|_| (), &std::sync::atomic::AtomicBool::new(false), |_| Ok(())).unwrap();
    assert_eq!((imported.digest, imported.format), (digest_of(&disk), Format::Qcow2));
    site.holds(&[imported.digest]);
}

#[test]
fn no_other_file_is_ever_read() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let secret = site.write("secret.raw", &patchy(1, 1 << 20));
    let refused = |path: &Path, what: &str| {
        let error = site.import(path, None).unwrap_err();
        assert!(matches!(error, StoreError::Refers { .. }), "{}", chain(&error));
        for part in [what, "secret.raw", "qemu-img convert"] {
            assert!(chain(&error).contains(part), "{part} in: {}", chain(&error));
        }
        site.holds(&[]);
    };
    let overlay = site.path("overlay.qcow2");
    for compat in ["compat=1.1", "compat=0.10"] {
        let create = ["create", "-q", "-f", "qcow2", "-o", compat, "-F", "raw", "-b"];
        run(Command::new("qemu-img").args(create).args([&secret, &overlay]));
        refused(&overlay, "backing file");
    }
    let external = site.path("external.qcow2");
    let option = format!("data_file={},data_file_raw=on", secret.display());
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &option]).arg(&external).arg("1M"));
    refused(&external, "external data file");

    // Said to be raw, they are what they are: bytes.
    std::fs::File::options().write(true).open(&overlay).unwrap().set_len(1 << 20).unwrap();
    let imported = site.import(&overlay, Some(Format::Raw)).unwrap();
    assert_eq!(imported.digest, digest_of(&std::fs::read(&overlay).unwrap()));
}

#[test]
fn other_formats_are_named_in_the_refusal() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let raw = site.write("disk.raw", &patchy(1, 1 << 20));
    let kinds: &[(&[&str], &str)] = &[
        (&["-O", "vmdk", "-o", "subformat=monolithicFlat"], "VMDK descriptor"),
        (&["-O", "vdi"], "VDI"),
        (&["-O", "vhdx"], "VHDX"),
        (&["-O", "vpc"], "VHD"),
        (&["-O", "vpc", "-o", "subformat=fixed"], "VHD"),
        (&["-O", "qed"], "QED"),
        (&["-O", "qcow"], "qcow of version 1"),
    ];
    for (options, name) in kinds {
        let error = site.import(&convert(&site, &raw, options), None).unwrap_err();
        assert!(matches!(error, StoreError::UnknownFormat { .. }), "{options:?}: {}", chain(&error));
        assert!(error.to_string().contains(name) && error.to_string().contains("qemu-img convert"), "{error}");
    }
    let packed = site.write("disk.raw.xz", b"\xfd7zXZ\0\0\x04and so on");
    let error = site.import(&packed, None).unwrap_err();
    assert!(error.to_string().contains("unpack it first"), "{error}");
    let error = site.import(&raw, Some(Format::Qcow2)).unwrap_err();
    assert!(matches!(error, StoreError::OtherFormat { expected: Format::Qcow2, .. }), "{error}");
    site.holds(&[]);
}

#[test]
fn features_that_are_not_supported_are_named() {
    if !have("qemu-img") {
        return;
    }
    let site = Site::new();
    let raw = site.write("disk.raw", &patchy(1, 1 << 20));
    let path = convert(&site, &raw, &["-O", "qcow2", "-c", "-o", "compression_type=zstd"]);
    let error = site.import(&path, None).unwrap_err();
    assert!(matches!(error, StoreError::Qcow2 { fault: Fault::Features { .. }, .. }), "{}", chain(&error));
    assert!(chain(&error).contains("zstd"), "{}", chain(&error));
}
