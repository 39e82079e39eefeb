//! The command line against the daemon, as an operator types it.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::daemon::Daemon;
use crate::session::harness::image_bytes;

const IMAGE_BYTES: usize = 1 << 20;

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn pando(daemon: &Daemon, arguments: &[&str]) -> Ran {
    run(daemon, arguments, &[])
}

/// Runs `pando` with bytes on its standard input.
fn run(daemon: &Daemon, arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pando"));
    command.args(arguments).env("PANDO_API", daemon.api());
    let mut process =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pando starts");
    let mut to = process.stdin.take().expect("a pipe");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || to.write_all(input));
        process.wait_with_output().expect("pando ends")
    });
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code().expect("an exit code"), out: text(output.stdout), err: text(output.stderr) }
}

#[track_caller]
fn ok(daemon: &Daemon, arguments: &[&str]) -> String {
    let ran = pando(daemon, arguments);
    assert_eq!(ran.code, 0, "{arguments:?}: {}", ran.err);
    ran.out
}

#[test]
fn an_operators_day() {
    let daemon = Daemon::new();
    let contents = image_bytes(IMAGE_BYTES, 7);
    let ran = run(&daemon, &["image", "import", "-", "--version", "debian-1"], &contents);
    let digest = blake3::hash(&contents).to_hex();
    assert_eq!((ran.code, ran.out.as_str()), (0, format!("{digest}  debian-1\n").as_str()), "{}", ran.err);
    let file = daemon.path("second.raw");
    std::fs::write(&file, image_bytes(IMAGE_BYTES, 8)).expect("an image");
    ok(&daemon, &["image", "import", file.to_str().expect("text"), "--version", "debian-2"]);
    let list = ok(&daemon, &["image", "list"]);
    assert!(list.lines().count() == 3 && list.contains("debian-1  ") && list.contains(&digest[..12]), "{list}");
    let images: Value = serde_json::from_str(&ok(&daemon, &["image", "list", "--json"])).expect("JSON");
    assert_eq!(images[0]["bytes"], IMAGE_BYTES);
    let out = daemon.path("out.raw");
    ok(&daemon, &["image", "export", "debian-1", out.to_str().expect("text")]);
    assert_eq!(std::fs::read(&out).expect("a file"), contents);
    let again = pando(&daemon, &["image", "export", "debian-1", out.to_str().expect("text")]);
    assert!(again.code == 1 && again.err.contains("exists"), "{}", again.err);
    assert!(pando(&daemon, &["image", "verify", "debian-1"]).err.contains("is whole"));

    ok(&daemon, &["channel", "set", "debian/stable", "debian-1"]);
    ok(&daemon, &["volume", "create", "web", "--channel", "debian/stable", "--kind", "cow", "--size", "20G"]);
    ok(&daemon, &["volume", "create", "os", "--channel", "debian/stable", "--kind", "read-only"]);
    ok(&daemon, &["volume", "create", "data", "--kind", "blank", "--size", "1G"]);
    let socket = ok(&daemon, &["attach", "web", "--vm", "w1", "--os"]);
    assert_eq!(socket.trim(), daemon.path("run/vm/w1/web.sock").to_str().expect("text"));
    for (vm, vmm, words) in [
        ("w2", "qemu", "-device vhost-user-blk-pci,chardev=char-os"),
        ("w3", "cloud-hypervisor", "--disk vhost_user=true,socket="),
        ("w4", "firecracker", "\"drive_id\":\"os\""),
        ("w5", "libvirt", "<disk type='vhostuser' device='disk'>"),
    ] {
        let lines = ok(&daemon, &["attach", "os", "--vm", vm, "--print", vmm]);
        assert!(lines.contains(words) && lines.contains(&format!("{vm}/os.sock")), "{lines}");
    }
    ok(&daemon, &["channel", "set", "debian/stable", "debian-2"]);
    let volumes = ok(&daemon, &["volume", "list"]);
    assert!(volumes.contains("debian-2 (next boot)") && volumes.contains("debian-2 (rebuild)"), "{volumes}");
    let vms = ok(&daemon, &["vm", "list"]);
    assert!(vms.lines().any(|line| line.split_whitespace().eq(["w3", "debian-1", "debian-2", "os", "-"])), "{vms}");
    let history = ok(&daemon, &["channel", "history", "debian/stable"]);
    assert_eq!(history.lines().count(), 3, "{history}");

    ok(&daemon, &["group", "create", "g"]);
    ok(&daemon, &["group", "add", "g", "vm:w2", "vm:w3"]);
    let deployment = ok(&daemon, &["deploy", "debian/stable", "--group", "g"]);
    assert_eq!(deployment.matches("staged, active at next boot").count(), 2, "{deployment}");
    let waited = pando(&daemon, &["deploy", "debian-2", "--group", "g", "--wait", "--timeout", "1"]);
    assert!(waited.code == 1 && waited.err.contains("2 volumes do not have it"), "{}", waited.err);
    ok(&daemon, &["detach", "os", "--vm", "w2"]);
    ok(&daemon, &["detach", "os", "--vm", "w3"]);
    ok(&daemon, &["attach", "os", "--vm", "w2"]);
    ok(&daemon, &["attach", "os", "--vm", "w3"]);
    let shown = ok(&daemon, &["deployment", "show", "2"]);
    assert_eq!(shown.matches(" active ").count(), 2, "{shown}");
    assert!(ok(&daemon, &["deploy", "--rollback", "2"]).contains("rolled-back"));

    assert!(ok(&daemon, &["events"]).contains("deployment.rolled-back"));
    assert!(ok(&daemon, &["audit", "--limit", "1"]).contains("deployment.rollback"));
    assert!(ok(&daemon, &["status"]).contains("attachments  5"));
    assert_eq!(ok(&daemon, &["top", "--once"]).lines().count(), 6);
    ok(&daemon, &["detach", "web"]);
    let many = pando(&daemon, &["detach", "os"]);
    assert!(many.code == 1 && many.err.contains("say which with --vm"), "{}", many.err);
}

#[test]
fn exit_codes_say_what_a_script_can_do() {
    let mut daemon = Daemon::new();
    daemon.import("os", IMAGE_BYTES, 1);
    ok(&daemon, &["volume", "create", "v", "--image", "os", "--kind", "read-only"]);
    for (arguments, code) in [
        (&["volume", "show", "w"][..], 4),
        (&["image", "rm", "os"], 6),
        (&["volume", "create", "v", "--image", "os", "--kind", "cow"], 6),
        (&["volume", "create", "a/b", "--image", "os", "--kind", "cow"], 1),
        (&["volume", "create", "v"], 1),
    ] {
        let ran = pando(&daemon, arguments);
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{arguments:?}: {}", ran.err);
        assert!(!ran.err.is_empty());
    }
    daemon.stop();
    let ran = pando(&daemon, &["status"]);
    assert!(ran.code == 7 && ran.err.contains("no daemon answers at"), "{}", ran.err);
}

#[test]
fn events_are_followed_as_they_happen() {
    use std::io::{BufRead, BufReader};
    let daemon = Daemon::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pando"));
    command.args(["events", "--follow", "--after", "0", "--json"]).env("PANDO_API", daemon.api());
    let mut process = command.stdout(Stdio::piped()).spawn().expect("pando starts");
    let mut lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON") };
    daemon.import("one", IMAGE_BYTES, 1);
    assert_eq!(next()["kind"], "image.imported");
    daemon.set_channel("c", "one");
    let event = next();
    assert_eq!((&event["kind"], &event["object"]), (&json!("channel.moved"), &json!("channel:c")));
    process.kill().expect("it is stopped");
    process.wait().expect("it ends");
}

#[test]
fn what_packages_install_is_made_of_the_commands() {
    let daemon = Daemon::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&daemon, &["completions", shell]).contains("rollback"));
    }
    let pages = daemon.path("man");
    ok(&daemon, &["man", pages.to_str().expect("text")]);
    for page in ["pando.1", "pando-daemon.1", "pando-volume-create.1", "pando-deploy.1"] {
        assert!(pages.join(page).is_file(), "{page}");
    }
}
