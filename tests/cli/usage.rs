//! Arguments, messages and exit codes; `create`, `digest` and `serve`.

use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use super::disk::{CLUSTER, Disk};
use super::{holds, pando, run};

#[test]
fn a_delta_is_created_for_an_image() {
    let disk = Disk::new(3 * CLUSTER, 3 * CLUSTER);
    let (base, new) = (disk.path("base.raw"), disk.path("new.delta"));
    let (base, new) = (base.to_str().unwrap(), new.to_str().unwrap());
    let digest = disk.header.base.unwrap().digest.to_string();
    let created = pando(["delta", "create", new, "--base", base, "--size", "1G", "--cluster-size", "64K"]);
    holds(created.ok(), &[new, base, &digest, "1 GiB"]);

    let info = pando(["delta", "info", new, "--json"]).json();
    assert_eq!(info["base"]["digest"], digest);
    assert_eq!(info["base"]["bytes"], 3 * CLUSTER);
    assert_eq!(info["virtual_bytes"], 1 << 30);
    assert_eq!(info["cluster_bytes"], 64 << 10);
    assert_eq!(info["clusters"]["base"], 1 << 14);
    assert_eq!(info["session"]["state"], "closed");
    holds(pando(["delta", "info", new]).ok(), &[&digest, "1 GiB (1073741824 bytes)", "64 KiB", "closed in good order"]);
    assert_eq!(pando(["delta", "check", new]).ok(), format!("{new}: no faults\n"));
}

#[test]
fn a_delta_is_created_over_nothing_or_on_trust() {
    let disk = Disk::new(CLUSTER, CLUSTER);
    let new = |name| disk.path(name).to_str().unwrap().to_owned();
    let blank = new("blank.delta");
    pando(["delta", "create", &blank, "--blank", "--size", "20G"]).ok();
    assert!(pando(["delta", "info", &blank, "--json"]).json()["base"].is_null());
    holds(pando(["delta", "info", &blank]).ok(), &["a blank volume"]);

    let (trusting, base, digest) = (new("trusting.delta"), new("base.raw"), "a5".repeat(32));
    pando(["delta", "create", &trusting, "--base", &base, "--base-digest", &digest]).ok();
    assert_eq!(pando(["delta", "info", &trusting, "--json"]).json()["base"]["digest"], digest);
    assert!(!disk.path("base.raw.digest").exists(), "a digest that is given is not computed");
}

#[test]
fn what_cannot_be_created_is_refused_with_the_reason() {
    let disk = Disk::new(CLUSTER + 100, 2 * CLUSTER);
    let path = |name| disk.path(name).to_str().unwrap().to_owned();
    let (base, new, delta) = (path("base.raw"), path("new.delta"), path("vm.delta"));
    let create = |file: &str, arguments: &[&str]| pando(["delta", "create", file].iter().chain(arguments));
    let before = std::fs::read(disk.delta()).unwrap().len();

    holds(create(&delta, &["--base", &base, "--size", "8K"]).refused(), &["vm.delta exists already", "another name"]);
    assert_eq!(std::fs::read(disk.delta()).unwrap().len(), before);
    holds(create(&new, &["--blank", "--size", "1000"]).refused(), &["1000 bytes", "multiple of 512"]);
    holds(create(&new, &["--base", &base, "--size", "5000"]).refused(), &["5000 bytes", "multiple of 512"]);
    holds(create(&new, &["--base", &base]).refused(), &["base.raw does not end with a whole sector", "--size 4608"]);
    holds(create(&new, &["--base", &base, "--size", "4K"]).refused(), &["4096 bytes", "its base of 4196 bytes"]);
    holds(create(&new, &["--base", &path("none.raw")]).refused(), &["none.raw", "No such file"]);
    holds(create(&new, &["--base", &path("")]).refused(), &["no regular file"]);
    assert!(!disk.path("new.delta").exists(), "nothing is left of what was refused");
    assert!(!disk.path("base.raw.digest").exists(), "what cannot be is refused ahead of reading the image");
}

#[test]
fn arguments_that_make_no_sense_end_with_code_1_and_help_with_code_0() {
    for (arguments, expected) in [
        (&["delta", "create", "x"][..], "--base <IMAGE>|--blank"),
        (&["delta", "create", "x", "--blank"], "--size"),
        (&["delta", "create", "x", "--blank", "--base", "y", "--size", "1G"], "cannot be used with"),
        (&["delta", "create", "x", "--blank", "--size", "1Q"], "such as 20G"),
        (&["delta", "create", "x", "--blank", "--size", "1G", "--cluster-size", "5K"], "power of two"),
        (&["delta", "create", "x", "--base", "y", "--base-digest", "abc"], "64 hexadecimal digits"),
        (&["delta", "frobnicate"], "unrecognized subcommand"),
        (&[], "Usage"),
    ] {
        let ran = pando(arguments);
        assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{arguments:?}");
        holds(&ran.err, &[expected]);
    }
    holds(pando(["--help"]).ok(), &["serve", "delta", "image", "Exit codes"]);
    holds(pando(["delta", "check", "--help"]).ok(), &["  2  faults", "  3  no faults", "--repair"]);
    assert_eq!(pando(["--version"]).ok(), format!("pando {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn what_is_no_delta_is_refused_by_every_command() {
    let disk = Disk::new(2 * CLUSTER, 2 * CLUSTER);
    let base = disk.path("base.raw");
    for arguments in [&["info"][..], &["check"], &["check", "--repair"], &["map"]] {
        let base = base.to_str().unwrap();
        let ran = pando([&["delta"], arguments, &[base]].concat());
        holds(ran.refused(), &[base, "not a Pando delta", "PANDODLT"]);
        let ran = pando([&["delta"], arguments, &["/nowhere/at.all"]].concat());
        holds(ran.refused(), &["/nowhere/at.all", "No such file"]);
    }
}

#[test]
fn a_digest_is_computed_once_and_remembered() {
    // Long enough for the parallel path.
    let disk = Disk::new((5 << 20) + 512, (5 << 20) + 512);
    let base = disk.path("base.raw");
    let base = base.to_str().unwrap();
    let digest = disk.header.base.unwrap().digest.to_string();
    let first = pando(["image", "digest", base]);
    assert_eq!(first.ok(), format!("{digest}  {base}\n"));
    assert_eq!(first.err, "", "nothing to remark, and no progress bar without a terminal");
    let second = pando(["image", "digest", base]);
    assert_eq!(second.ok(), first.out);
    holds(&second.err, &["from the record", "base.raw.digest"]);
    let json = pando(["image", "digest", base, "--json"]).json();
    assert_eq!((&json["digest"], &json["origin"]), (&digest.into(), &"record".into()));

    std::fs::File::options().append(true).open(base).unwrap().write_all(&[1; 512]).unwrap();
    let json = pando(["image", "digest", base, "--json"]).json();
    assert_eq!(json["origin"], "computed");
    assert_eq!(json["digest"], blake3::hash(&std::fs::read(base).unwrap()).to_hex().as_str());
    holds(pando(["image", "digest", "/nowhere/at.all"]).refused(), &["/nowhere/at.all", "No such file"]);
}

#[test]
fn serve_executes_the_backend_with_the_same_arguments() {
    // A backend that says what it was given. Links, so that no file is being written when it is executed.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (with, without) = (directory.path().join("with"), directory.path().join("without"));
    for place in [&with, &without] {
        std::fs::create_dir(place).unwrap();
        let original = env!("CARGO_BIN_EXE_pando");
        std::fs::hard_link(original, place.join("pando"))
            .or_else(|_| std::fs::copy(original, place.join("pando")).map(drop))
            .unwrap();
    }
    symlink("/bin/echo", with.join("pando-blk")).unwrap();
    let arguments = ["serve", "--base", "a b", "-x", "--help", "--version", "--", "-"];

    let beside = run(Command::new(with.join("pando")).args(arguments).env("PATH", ""));
    assert_eq!(beside.ok(), "--base a b -x --help --version -- -\n");
    let in_path = run(Command::new(without.join("pando")).args(arguments).env("PATH", &with));
    assert_eq!(in_path.ok(), beside.out);
    let nowhere = run(Command::new(without.join("pando")).args(arguments).env("PATH", "/nowhere"));
    holds(nowhere.refused(), &["cannot execute pando-blk", "beside this program or in PATH"]);
}

#[test]
fn the_wrong_base_is_refused_with_both_digests() {
    let disk = Disk::new(2 * CLUSTER, 4 * CLUSTER);
    let other = disk.path("other.raw");
    std::fs::write(&other, vec![7; 2 * CLUSTER as usize]).unwrap();
    let expected = disk.header.base.unwrap().digest.to_string();
    let found = blake3::hash(&vec![7; 2 * CLUSTER as usize]).to_hex();
    let serve = |arguments: &[&str]| {
        let (delta, socket) = (disk.delta(), disk.path("socket"));
        let both = ["serve", "--delta", delta.to_str().unwrap(), "--socket-path", socket.to_str().unwrap()];
        pando([&both, arguments].concat())
    };
    let refused = serve(&["--base", other.to_str().unwrap()]);
    assert_eq!(refused.code, 1, "{refused:?}");
    holds(&refused.err, &["vm.delta", &expected, &found]);
    let base = disk.path("base.raw");
    let refused = serve(&["--base", base.to_str().unwrap(), "--size", "32K"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    holds(&refused.err, &["vm.delta", "16384 bytes", "32768 bytes"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    // More output than a pipe holds.
    let disk = Disk::new(CLUSTER, 8192 * CLUSTER);
    let session = disk.session();
    (0..2048).for_each(|i| session.write(4 * i * CLUSTER, &[1; CLUSTER as usize]));
    session.close();
    let mut child = Command::new(env!("CARGO_BIN_EXE_pando"))
        .args(["delta", "map", "--json"])
        .arg(disk.delta())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 10]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    // The whole of it is long enough to tell.
    assert!(disk.pando("map", &["--json"]).ok().len() > 200_000);

    let full =
        run(Command::new("sh").args(["-c", "exec \"$@\" >/dev/full", "sh", env!("CARGO_BIN_EXE_pando"), "--version"]));
    assert!(!full.err.contains("panic"), "{full:?}");
    let info = run(Command::new("sh")
        .args(["-c", "exec \"$@\" >/dev/full", "sh", env!("CARGO_BIN_EXE_pando"), "delta", "info"])
        .arg(disk.delta()));
    holds(info.refused(), &["cannot write to standard output", "No space left"]);
}
