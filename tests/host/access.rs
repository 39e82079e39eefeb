//! Who may do what: users of the host with grants and without, and the audit log that has it all.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use serde_json::{Value, json};

use super::daemon::Daemon;

const IMAGE_BYTES: usize = 1 << 20;
/// Two users whom nothing is granted by anything but this test.
const STRANGER: u32 = 61_001;
const READER: u32 = 61_002;

/// What `pando` says to a user: exit code, standard output and standard error.
fn pando_as(daemon: &Daemon, uid: u32, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &uid.to_string(), "--regid", &uid.to_string(), "--clear-groups", "--"]);
    // Through a copy that any user may execute, wherever the build lies.
    command.arg(daemon.path("pando")).args(arguments).env("PANDO_API", daemon.api());
    let output = command.output().expect("setpriv starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code().expect("an exit code"), text(output.stdout), text(output.stderr))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn users_may_what_their_groups_grants_say_and_the_audit_log_has_it() {
    if !is_root() {
        eprintln!("not done: only root can be other users");
        return;
    }
    let daemon = Daemon::new();
    std::fs::copy(env!("CARGO_BIN_EXE_pando"), daemon.path("pando")).expect("a copy");
    for path in ["", "run", "run/vm"] {
        std::fs::set_permissions(daemon.path(path), std::fs::Permissions::from_mode(0o755)).expect("a directory");
    }
    daemon.import("os", IMAGE_BYTES, 1);
    daemon.set_channel("os/stable", "os");
    for (name, kind) in [("web-os", "read-only"), ("web-cow", "cow"), ("db-os", "read-only")] {
        daemon.post("/v1/volumes", json!({ "name": name, "kind": kind, "channel": "os/stable" }));
    }
    daemon.ask("PUT", "/v1/groups/web", None).ok();
    daemon.post("/v1/groups/web/members", json!({ "member": format!("uid:{READER}") }));
    daemon.post("/v1/groups/web/grants", json!({ "verb": "use", "on": "volume:web-*" }));

    // Nothing but help for who has no grant.
    let file = daemon.path("os.raw");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("an image");
    let file = file.to_str().expect("text");
    let (code, help, _) = pando_as(&daemon, STRANGER, &["--help"]);
    assert!(code == 0 && help.contains("Exit codes"), "{help}");
    let asked: [&[&str]; 18] = [
        &["image", "list"],
        &["image", "show", "os"],
        &["image", "import", file],
        &["image", "rm", "os"],
        &["channel", "list"],
        &["channel", "show", "os/stable"],
        &["channel", "set", "os/stable", "os"],
        &["channel", "rollback", "os/stable"],
        &["volume", "list"],
        &["volume", "create", "new", "--image", "os", "--kind", "cow"],
        &["volume", "rm", "web-cow"],
        &["attach", "web-os", "--vm", "a"],
        &["attach", "no-such-volume", "--vm", "a"],
        &["deploy", "os", "--group", "web"],
        &["group", "add", "web", "uid:61001"],
        &["audit"],
        &["events"],
        &["vm", "list"],
    ];
    for arguments in asked {
        let (code, out, error) = pando_as(&daemon, STRANGER, arguments);
        assert_eq!((code, out.as_str()), (5, ""), "{arguments:?}: {error}");
        assert!(error.contains("uid:61001 may not"), "{arguments:?}: {error}");
    }

    // Who may use may attach what is read-only, and connect there, and not write.
    let (code, socket, error) = pando_as(&daemon, READER, &["attach", "web-os", "--vm", "a"]);
    assert_eq!(code, 0, "{error}");
    let socket = std::fs::metadata(socket.trim()).expect("a socket");
    assert_eq!((socket.uid(), socket.mode() & 0o777), (READER, 0o600), "nobody else connects");
    let (code, list, _) = pando_as(&daemon, READER, &["volume", "list", "--json"]);
    let names = |list: &str| -> Vec<String> {
        let list: Value = serde_json::from_str(list).expect("JSON");
        list.as_array()
            .expect("a list")
            .iter()
            .map(|volume| volume["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    assert_eq!((code, names(&list)), (0, vec!["web-cow".to_owned(), "web-os".to_owned()]), "no more than is granted");
    for arguments in [
        &["attach", "web-cow", "--vm", "a"][..],
        &["attach", "db-os", "--vm", "a"],
        &["volume", "rm", "web-cow"],
        &["volume", "reset", "web-cow"],
        &["channel", "set", "os/stable", "os"],
        &["image", "list"],
    ] {
        let (code, _, error) = pando_as(&daemon, READER, arguments);
        assert_eq!(code, 5, "{arguments:?}: {error}");
    }
    let (code, _, error) = pando_as(&daemon, READER, &["detach", "web-os"]);
    assert_eq!(code, 0, "{error}");
    daemon.post("/v1/groups/web/grants", json!({ "verb": "write", "on": "volume:web-cow" }));
    let (code, _, error) = pando_as(&daemon, READER, &["attach", "web-cow", "--vm", "a"]);
    assert_eq!(code, 0, "{error}");
    let given = json!({ "volume": "db-os", "vm": "a", "owner": { "uid": STRANGER, "gid": STRANGER } });
    let socket = daemon.post("/v1/attachments", given)["socket"].as_str().expect("a socket").to_owned();
    assert_eq!(std::fs::metadata(socket).expect("a socket").uid(), STRANGER, "by root to whom it likes");
    let (code, _, error) = pando_as(&daemon, READER, &["attach", "web-os", "--vm", "c", "--owner", "0:0"]);
    assert!(code == 5 && error.contains("give a socket to another user"), "{error}");
    let revoked = daemon.ask("DELETE", "/v1/groups/web/grants?verb=use&on=volume:web-*", None).ok();
    assert_eq!(revoked["grants"], json!([{ "verb": "write", "on": "volume:web-cow" }]));
    assert_eq!(pando_as(&daemon, READER, &["attach", "web-os", "--vm", "b"]).0, 5);
    // Who may publish images uploads them, and reads no file through the daemon.
    daemon.post("/v1/groups/web/grants", json!({ "verb": "publish", "on": "image:*" }));
    let (code, _, error) = pando_as(&daemon, READER, &["image", "import", file, "--version", "theirs"]);
    assert_eq!(code, 0, "{error}");

    let records = daemon.get("/v1/audit");
    let count = |principal: u32, action: &str, object: &str, outcome: &str| {
        let is_it = |record: &&Value| {
            record["principal"] == format!("uid:{principal}")
                && record["action"] == action
                && record["object"] == object
                && record["outcome"] == outcome
        };
        records.as_array().expect("a list").iter().filter(is_it).count()
    };
    assert_eq!(count(STRANGER, "attach", "volume:web-os", "denied"), 1);
    assert_eq!(count(STRANGER, "channel.set", "channel:os/stable", "denied"), 1);
    assert_eq!(count(STRANGER, "audit.list", "audit", "denied"), 1);
    assert_eq!(count(READER, "attach", "volume:web-os", "done"), 1);
    assert_eq!(count(READER, "attach", "volume:web-cow", "denied"), 1);
    assert_eq!(count(READER, "attach", "volume:web-cow", "done"), 1);
    assert_eq!(count(READER, "detach", "volume:web-os", "done"), 1);
    assert_eq!(count(0, "group.revoke", "group:web", "done"), 1);
    // What was denied stands there once for each that was asked for; the last of `asked` is about three requests.
    let denied = records.as_array().expect("a list").iter();
    let denied =
        denied.filter(|record| record["principal"] == format!("uid:{STRANGER}") && record["outcome"] == "denied");
    assert!(denied.count() >= asked.len());
}

#[test]
fn nobody_but_root_is_root_by_saying_so() {
    if !is_root() {
        eprintln!("not done: only root can be other users");
        return;
    }
    let daemon = Daemon::new();
    std::fs::copy(env!("CARGO_BIN_EXE_pando"), daemon.path("pando")).expect("a copy");
    for path in ["", "run"] {
        std::fs::set_permissions(daemon.path(path), std::fs::Permissions::from_mode(0o755)).expect("a directory");
    }
    // By its path, a file that this user could not read itself.
    let secret = daemon.path("secret.raw");
    std::fs::write(&secret, vec![1; 4096]).expect("a file");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("a file");
    daemon.ask("PUT", "/v1/groups/g", None).ok();
    daemon.post("/v1/groups/g/members", json!({ "member": format!("gid:{READER}") }));
    daemon.post("/v1/groups/g/grants", json!({ "verb": "admin", "on": "image:*" }));
    let (code, _, error) = pando_as(&daemon, READER, &["image", "import", secret.to_str().expect("text")]);
    assert!(code == 1 && error.contains("Permission denied"), "{code}: {error}");
    assert!(daemon.image_files().is_empty());
}
