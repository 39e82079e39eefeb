//! Full file systems, and limits of the process: a clear error, and nothing left.
//!
//! Such limits hold for a whole process, so each test runs this binary once more, with the limit and with only itself.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use pando::store::{Source, Store, StoreError};

use super::{Site, chain, import, patchy};

/// Tells the second run from the first, and where its store is to be.
const ROOM: &str = "PANDO_TEST_ROOM";

/// Runs the test `name` once more, by a shell script that ends in `exec "$@"`; `None` when the script says that it cannot.
fn again(name: &str, room: &Path, script: &str, unshare: &[&str]) -> Option<()> {
    let mut command = if unshare.is_empty() { Command::new("sh") } else { Command::new("unshare") };
    if !unshare.is_empty() {
        command.args(unshare).arg("sh");
    }
    command.args(["-c", script, "sh"]).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name, "--nocapture"]).env(ROOM, room).output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && !said.contains("running 1 test") {
        println!("skipped: {said}");
        return None;
    }
    assert!(output.status.success(), "{said}");
    Some(())
}

/// Imports more than fits, in each way that there is.
fn overfill(room: &Path) {
    let site = Site::new();
    let store = Store::open(&room.join("store")).unwrap();
    let full = |result: Result<_, StoreError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{}", chain(&error));
        assert!(chain(&error).contains("store/images"), "{}", chain(&error));
        assert_eq!(std::fs::read_dir(room.join("store/images")).unwrap().count(), 0);
    };
    let disk = patchy(1, 2 << 20);
    let small = site.write("small.raw", &disk[..512 << 10]);
    let pattern: Vec<u8> = patchy(2, 4 << 20).iter().map(|byte| byte | 1).collect();
    let mut spool = store.spool().unwrap();
    full((0..4).try_for_each(|_| spool.write(&pattern)));
    drop(spool);
    // Beside it, so that this is no matter of the limit.
    if let Ok(large) = std::env::var("PANDO_TEST_LARGE") {
        full(import(&store, large.as_ref(), None).map(|_| ()));
    }
    let imported = import(&store, &small, None).unwrap();
    store.verify(&imported.digest, &|_| (), &AtomicBool::new(false)).unwrap();
    let source = Source::file(store.open_image(&imported.digest, None).unwrap(), "itself");
    assert!(store.import(source, &|_| (), &AtomicBool::new(false), |_| Ok(())).unwrap().was_there);
}

#[test]
fn the_limit_of_a_file_is_no_crash() {
    let name = "store::limits::the_limit_of_a_file_is_no_crash";
    if let Ok(room) = std::env::var(ROOM) {
        return overfill(room.as_ref());
    }
    let room = tempfile::tempdir().unwrap();
    let large = room.path().join("large.raw");
    std::fs::write(&large, patchy(3, 16 << 20)).unwrap();
    // The signal of this limit is ignored, as the daemon ignores it, and the error is what is left.
    let script = format!("trap '' XFSZ; export PANDO_TEST_LARGE='{}'; ulimit -f 8192; exec \"$@\"", large.display());
    again(name, room.path(), &script, &[]);
}

#[test]
fn a_full_file_system_is_told_from_other_errors() {
    let name = "store::limits::a_full_file_system_is_told_from_other_errors";
    if let Ok(room) = std::env::var(ROOM) {
        return overfill(room.as_ref());
    }
    let (room, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let large = other.path().join("large.raw");
    std::fs::write(&large, patchy(3, 16 << 20)).unwrap();
    // In a namespace of its own, where everybody may mount, unless that is forbidden.
    let script = format!(
        "mount -t tmpfs -o size=6m none '{}' && export PANDO_TEST_LARGE='{}' && exec \"$@\"",
        room.path().display(),
        large.display()
    );
    again(name, room.path(), &script, &["-r", "-m"]);
}
