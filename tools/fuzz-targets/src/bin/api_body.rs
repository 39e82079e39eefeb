//! Requests to the daemon's API, with paths, queries and bodies that may say anything, from root, from others and from nobody: nothing panics, and
//! every answer is a result of the documented kind or a problem document, never one of the daemon's own failure.
//!
//! The router and all that is behind it are the daemon's, over a state directory that begins with a few images, channels, volumes and groups. Only the
//! backends are missing: a volume cannot be attached.
#![no_main]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, Uri, header};
use fuzz_targets::{Choices, open_descriptors};
use libfuzzer_sys::fuzz_target;
use pando::daemon::api::{self, types};
use pando::daemon::{Backends, Caller, Host, Manner, Places};
use pando::vhost_user::transfers::Io;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tower_service::Service;

/// Requests of one input.
const REQUESTS_MAX: usize = 16;
/// The longest answer. One that is longer has no bounds.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// How long what a request has started may go on.
const PATIENCE: Duration = Duration::from_secs(10);

/// Names of things that are there, and of some that are not.
const NAMES: [&str; 14] = [
    "web-1",
    "os",
    "os-2",
    "debian/stable",
    "group",
    "vm-1",
    "blank",
    "new",
    "uid:1000",
    "vm:vm-1",
    "1",
    "2",
    "new-2",
    "x",
];
/// Grants' objects.
const OBJECTS: [&str; 6] = ["volume:web-*", "image:*", "channel:debian/*", "volume:*", "channel:*", "volume:web-1"];

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());

/// Where all of this lies, in memory where that is possible.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let root = parent.join(format!("pando-fuzz-api-{}", std::process::id()));
    // What a run that failed left, whose number has come again.
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir(&root).unwrap();
    root
});

/// A state directory that a daemon has left, to begin with.
static BEGINNING: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = ROOT.join("beginning");
    let site = Site::open(&root);
    let done = |method: &str, path: &str, body: Value| {
        let answer = site.ask(request(method, path, Some(&body), Some(caller(0))).unwrap());
        assert!(answer.status.is_success(), "{path}: {}", answer.text());
    };
    for (version, byte) in [("os", 1), ("os-2", 2)] {
        let path = root.join(version);
        std::fs::write(&path, vec![byte; 64 << 10]).unwrap();
        done("POST", "/v1/images", json!({ "path": path, "version": version }));
        site.settle();
    }
    done("PUT", "/v1/channels/debian%2Fstable", json!({ "image": "os" }));
    done(
        "POST",
        "/v1/volumes",
        json!({ "name": "web-1", "kind": "cow", "ephemeral": true, "channel": "debian/stable" }),
    );
    done("POST", "/v1/volumes", json!({ "name": "os", "kind": "read-only", "image": "os" }));
    done("POST", "/v1/volumes", json!({ "name": "blank", "kind": "blank", "bytes": 1 << 20 }));
    done("PUT", "/v1/groups/group", json!({}));
    for member in ["uid:1000", "vm:vm-1"] {
        done("POST", "/v1/groups/group/members", json!({ "member": member }));
    }
    done("POST", "/v1/groups/group/grants", json!({ "verb": "write", "on": "volume:web-*" }));
    done("POST", "/v1/groups/group/grants", json!({ "verb": "use", "on": "image:*" }));
    site.close();
    root
});

/// What the document says of each operation: its successes.
static DOCUMENT: LazyLock<BTreeMap<(String, String), Vec<u16>>> = LazyLock::new(|| {
    let site = Site::begin();
    let answer = site.ask(request("GET", "/openapi.json", None, None).unwrap());
    site.close();
    let document: Value = serde_json::from_slice(&answer.body).unwrap();
    let mut operations = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap().iter().filter(|(_, found)| found.is_object()) {
            let responses = operation["responses"].as_object().unwrap();
            let statuses = responses.keys().filter_map(|status| status.parse().ok()).collect();
            operations.insert((method.to_uppercase(), path.clone()), statuses);
        }
    }
    operations
});

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    LazyLock::force(&DOCUMENT);
    let before = open_descriptors();
    let site = Site::begin();
    for _ in 0..REQUESTS_MAX {
        if choices.is_over() {
            break;
        }
        if let Some((request, route)) = random_request(&mut choices) {
            let (method, is_followed) = (request.method().to_string(), request.uri().to_string().contains("follow"));
            if is_followed {
                // Goes on without end.
                site.begin_to_ask(request);
            } else {
                check(&method, route, &site.ask(request));
            }
        }
        if choices.below(2) == 0 {
            site.settle();
        }
    }
    // What is there can be told of, whatever has happened.
    if choices.below(4) == 0 {
        for path in ["/v1/images", "/v1/channels", "/v1/volumes", "/v1/groups", "/v1/deployments", "/v1/jobs"] {
            let answer = site.ask(request("GET", path, None, Some(caller(0))).unwrap());
            assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
        }
        let answer = site.ask(request("GET", "/v1/audit", None, Some(caller(0))).unwrap());
        let records: Vec<types::AuditRecord> = serde_json::from_slice(&answer.body).unwrap();
        let is_short = |record: &types::AuditRecord| record.object.len() < 300 && record.detail.len() < 2000;
        assert!(records.iter().all(is_short), "anybody can fill the log: {records:?}");
    }
    site.close();
    // A thread that is done with the site may still hold what it did it with.
    let begun = Instant::now();
    while open_descriptors() > before && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_micros(200));
    }
    assert_eq!(open_descriptors(), before, "a descriptor stays open");
});

/// A daemon's inside.
struct Site {
    root: PathBuf,
    host: Arc<Host>,
    router: Router,
}

struct Answer {
    status: StatusCode,
    kind: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Site {
    /// One that begins as the last one has.
    fn begin() -> Site {
        let root = ROOT.join("site");
        let _ = std::fs::remove_dir_all(&root);
        let images = root.join("state/images");
        std::fs::create_dir_all(&images).unwrap();
        std::fs::copy(BEGINNING.join("state/pando.db"), root.join("state/pando.db")).unwrap();
        for image in std::fs::read_dir(BEGINNING.join("state/images")).unwrap() {
            let image = image.unwrap().path();
            std::fs::hard_link(&image, images.join(image.file_name().unwrap())).unwrap();
        }
        Site::open(&root)
    }

    fn open(root: &Path) -> Site {
        let manner = Manner { program: "/bin/false".into(), sandbox: false, users: None, poll_us: 0, io: Io::Auto };
        let (notices, _) = tokio::sync::mpsc::unbounded_channel();
        let backends = Backends::new(manner, u64::MAX, RUNTIME.handle().clone(), notices).unwrap();
        let places = Places { state: root.join("state"), run: root.join("run") };
        std::fs::create_dir_all(&places.state).unwrap();
        let host = Arc::new(Host::open(places, backends).unwrap());
        Site { root: root.to_owned(), router: api::router(Arc::clone(&host)), host }
    }

    /// Waits until nothing is at work.
    fn settle(&self) {
        let begun = Instant::now();
        while self.host.jobs.count() > 0 {
            assert!(begun.elapsed() < PATIENCE, "a job does not end");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn close(self) {
        self.settle();
        let Site { root, host, router } = self;
        drop(router);
        let begun = Instant::now();
        // A thread that has answered may not have let go yet.
        while Arc::strong_count(&host) > 1 {
            assert!(begun.elapsed() < PATIENCE, "something goes on");
            std::thread::sleep(Duration::from_micros(200));
        }
        drop(host);
        if root.ends_with("site") {
            std::fs::remove_dir_all(root).unwrap();
        }
    }

    fn ask(&self, request: Request<Body>) -> Answer {
        let mut router = self.router.clone();
        RUNTIME.block_on(async move {
            let Ok(response) = router.call(request).await;
            let kind = response.headers().get(header::CONTENT_TYPE);
            let kind = kind.map_or(String::new(), |kind| kind.to_str().unwrap().to_owned());
            let status = response.status();
            let body = to_bytes(response.into_body(), ANSWER_BYTES_MAX).await.expect("an answer with bounds");
            Answer { status, kind, body: body.into() }
        })
    }

    /// Asks, and does not listen.
    fn begin_to_ask(&self, request: Request<Body>) {
        let mut router = self.router.clone();
        RUNTIME.block_on(async move {
            let Ok(response) = router.call(request).await;
            assert_ne!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        });
    }
}

fn caller(uid: u32) -> Caller {
    Caller { uid, gids: vec![uid], process: 1 }
}

fn request(method: &str, uri: &str, body: Option<&Value>, caller: Option<Caller>) -> Option<Request<Body>> {
    let uri: Uri = uri.parse().ok()?;
    let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).ok()?).uri(uri);
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let mut request = request.body(body).ok()?;
    request.extensions_mut().extend(
        caller
            .map(|caller| {
                let mut extensions = axum::http::Extensions::new();
                extensions.insert(caller);
                extensions
            })
            .unwrap_or_default(),
    );
    Some(request)
}

/// Sees that an answer is one that is documented.
fn check(method: &str, route: Option<&str>, answer: &Answer) {
    let status = answer.status;
    if method == "HEAD" {
        return assert!(!status.is_server_error(), "{status}");
    }
    if !status.is_success() {
        assert_eq!(answer.kind, "application/problem+json", "{status}: {}", answer.text());
        let problem: types::Problem = serde_json::from_slice(&answer.body).expect("a problem document");
        assert_eq!(problem.status, status.as_u16());
        assert!(problem.kind.starts_with("about:blank#") && !problem.title.is_empty(), "{problem:?}");
        assert!(!problem.detail.is_empty() && problem.detail.len() < 4096, "{problem:?}");
        // No backend starts here.
        let is_missing = method == "POST" && route == Some("/v1/attachments");
        assert!(is_missing || status != StatusCode::INTERNAL_SERVER_ERROR, "{method} {route:?}: {problem:?}");
        return;
    }
    let Some(route) = route else { return };
    let Some(statuses) = DOCUMENT.get(&(method.to_owned(), route.to_owned())) else { return };
    assert!(statuses.contains(&status.as_u16()), "{method} {route}: {status}");
    if status == StatusCode::NO_CONTENT {
        return assert!(answer.body.is_empty());
    }
    match (method, route) {
        (_, "/v1/images/{image}/content") => assert_eq!(answer.body.len(), 64 << 10),
        ("GET", "/v1/images") => is::<Vec<types::Image>>(answer),
        (_, "/v1/images" | "/v1/images/upload" | "/v1/images/{image}/verify" | "/v1/jobs/{id}") => {
            is::<types::Job>(answer)
        }
        (_, "/v1/images/{image}") => is::<types::Image>(answer),
        (_, "/v1/channels") => is::<Vec<types::Channel>>(answer),
        (_, "/v1/channels/{name}/history") => is::<Vec<types::ChannelMove>>(answer),
        (_, "/v1/channels/{name}" | "/v1/channels/{name}/rollback") => is::<types::Channel>(answer),
        ("GET", "/v1/volumes") => is::<Vec<types::Volume>>(answer),
        (_, route) if route.starts_with("/v1/volumes") => is::<types::Volume>(answer),
        ("GET", "/v1/attachments") => is::<Vec<types::Attachment>>(answer),
        (_, route) if route.starts_with("/v1/attachments") => is::<types::Attachment>(answer),
        (_, "/v1/upgrade") => is::<Vec<types::Upgraded>>(answer),
        (_, "/v1/vms") => is::<Vec<types::Vm>>(answer),
        ("GET", "/v1/deployments") => is::<Vec<types::Deployment>>(answer),
        (_, route) if route.starts_with("/v1/deployments") => is::<types::Deployment>(answer),
        (_, "/v1/groups") => is::<Vec<types::Group>>(answer),
        (_, route) if route.starts_with("/v1/groups") => is::<types::Group>(answer),
        (_, "/v1/audit") => is::<Vec<types::AuditRecord>>(answer),
        (_, "/v1/jobs") => is::<Vec<types::Job>>(answer),
        (_, "/v1/load") => is::<Vec<types::Load>>(answer),
        (_, "/v1/events") => is::<Vec<types::Event>>(answer),
        (_, "/v1/status") => is::<types::Status>(answer),
        (method, route) => panic!("{method} {route} is documented and not known here"),
    }
}

fn is<T: DeserializeOwned>(answer: &Answer) {
    assert_eq!(answer.kind, "application/json");
    let found: Result<T, _> = serde_json::from_slice(&answer.body);
    assert!(found.is_ok(), "{} is not as documented", answer.text());
}

/// A request, and the route that it is meant for, if for any.
fn random_request(choices: &mut Choices<'_>) -> Option<(Request<Body>, Option<&'static str>)> {
    let operations: Vec<&'static (String, String)> = DOCUMENT.keys().collect();
    let (method, route) = operations[choices.below(operations.len() as u64) as usize];
    let method =
        if choices.rarely() { choices.one_of(&["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "X"]) } else { method };
    let mut path = String::new();
    for part in route.split('/').skip(1) {
        path.push('/');
        if part.starts_with('{') { path.push_str(&encoded(&name(choices))) } else { path.push_str(part) }
    }
    let mut route = Some(route.as_str());
    if choices.rarely() {
        path.push_str(choices.one_of(&["/", "//x", "/..", "%2F", "%ff", "?", "/x"]));
        route = None;
    }
    let query = random_query(choices, &path);
    let caller = match choices.below(8) {
        6 => Some(caller(1000)),
        7 => choices.one_of(&[Some(1), None, Some(u32::MAX)]).map(caller),
        _ => Some(caller(0)),
    };
    let mut request = request(method, &(path + &query), None, caller)?;
    let is_upload = route == Some("/v1/images/upload");
    if !choices.rarely() {
        let kind = if is_upload { "application/octet-stream" } else { "application/json" };
        request.headers_mut().insert(header::CONTENT_TYPE, kind.parse().unwrap());
    }
    *request.body_mut() = if is_upload { random_image(choices) } else { random_body(choices, route) };
    Some((request, route))
}

/// A name, mostly of something that is there.
fn name(choices: &mut Choices<'_>) -> String {
    match choices.below(16) {
        14 => text(choices),
        15 => choices.one_of(&[i64::MAX, -1, i64::MIN, 0]).to_string(),
        _ => choices.one_of(&NAMES).to_owned(),
    }
}

fn text(choices: &mut Choices<'_>) -> String {
    let mut bytes = vec![0; choices.below(80) as usize];
    choices.fill(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if choices.rarely() { text.repeat(100) } else { text }
}

/// As it stands in a path or a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~:".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn random_query(choices: &mut Choices<'_>, path: &str) -> String {
    let fields: &[&str] = match path {
        "/v1/audit" | "/v1/events" => &["after", "limit", "follow"],
        "/v1/images/upload" => &["version", "format"],
        path if path.starts_with("/v1/jobs/") => &["wait_ms"],
        path if path.ends_with("/grants") => &["verb", "on"],
        _ => return String::new(),
    };
    let mut parts = Vec::new();
    for field in fields {
        if choices.below(3) == 2 {
            continue;
        }
        let value = match *field {
            "version" => name(choices),
            "format" => choices.one_of(&["raw", "qcow2", "vmdk", "x"]).to_owned(),
            "verb" => choices.one_of(&["use", "write", "publish", "admin", "x"]).to_owned(),
            "on" => choices.one_of(&OBJECTS).to_owned(),
            "follow" => choices.one_of(&["false", "true", "1"]).to_owned(),
            // Nobody waits for long.
            "wait_ms" => choices.one_of(&["0", "20", "30001", "x"]).to_owned(),
            _ => choices.one_of(&["0", "1", "1000", "1001", "-1", "9223372036854775807", "x"]).to_owned(),
        };
        let value = if choices.rarely() { text(choices) } else { value };
        parts.push(format!("{field}={}", encoded(&value)));
    }
    if choices.rarely() {
        parts.push(choices.one_of(&["x=1", "=", "&&", "limit=1&limit=2", "%ff=%ff"]).to_owned());
    }
    format!("?{}", parts.join("&"))
}

fn random_body(choices: &mut Choices<'_>, route: Option<&str>) -> Body {
    if choices.rarely() {
        let mut bytes = vec![0; choices.below(200) as usize];
        choices.fill(&mut bytes);
        return bytes.into();
    }
    if choices.rarely() {
        // Deep, or long.
        return choices.one_of(&["[", "{\"a\":", " ", "1"]).repeat(1 + choices.below(20_000) as usize).into();
    }
    let fields: &[&str] = match route {
        Some("/v1/images") => &["path", "version", "format"],
        Some("/v1/volumes") => &["name", "kind", "image", "channel", "ephemeral", "bytes", "cluster_bytes"],
        Some("/v1/volumes/{name}/grow") => &["bytes"],
        Some("/v1/attachments") => &["volume", "vm", "role", "queues", "kernel_from_vmm", "delta_cache", "owner"],
        Some("/v1/deployments") => &["image", "channel", "group"],
        Some("/v1/groups/{name}/members") => &["member"],
        Some("/v1/groups/{name}/grants") => &["verb", "on"],
        Some("/v1/channels/{name}") => &["image"],
        _ => return Body::empty(),
    };
    let needed: &[&str] = match route {
        Some("/v1/images") => &["path"],
        Some("/v1/volumes") => &["name", "kind"],
        Some("/v1/attachments") => &["volume", "vm"],
        Some("/v1/deployments") => &["group"],
        _ => fields,
    };
    let mut body = serde_json::Map::new();
    for field in fields {
        if needed.contains(field) && !choices.rarely() || choices.below(3) == 1 {
            let value = if choices.rarely() { odd_value(choices) } else { value_of(choices, field) };
            body.insert((*field).to_owned(), value);
        }
    }
    if choices.rarely() {
        body.insert(text(choices), odd_value(choices));
    }
    let mut text = Value::Object(body).to_string().into_bytes();
    if choices.rarely() {
        let at = choices.below(text.len() as u64) as usize;
        text[at] = choices.any();
    }
    if choices.rarely() {
        text.truncate(choices.below(text.len() as u64) as usize);
    }
    text.into()
}

fn value_of(choices: &mut Choices<'_>, field: &str) -> Value {
    match field {
        "path" => {
            let image = BEGINNING.join("os").display().to_string();
            choices.one_of(&[image.as_str(), "/dev/null", "/", "x", "/nothing\0there", "/nothing/there", ""]).into()
        }
        "format" => choices.one_of(&["raw", "qcow2", "vmdk", "x"]).into(),
        "kind" => choices.one_of(&["cow", "read-only", "blank", "x"]).into(),
        "ephemeral" | "kernel_from_vmm" => (choices.below(2) == 1).into(),
        "bytes" => {
            let usual = [1 << 20, 64 << 10, 2 << 20, 65 << 10, 512, 513, 0];
            if choices.sometimes() { choices.any::<u64>().into() } else { choices.one_of(&usual).into() }
        }
        "cluster_bytes" => choices.one_of(&[4096, 65536, 8192, 0, 512, u64::MAX]).into(),
        "queues" => choices.one_of(&[1, 16, 0, 256, 257]).into(),
        "delta_cache" => choices.one_of(&["writeback", "direct", "x"]).into(),
        "role" => match choices.below(4) {
            0 => json!("os"),
            1 => json!("private"),
            2 => json!({ "addon": name(choices) }),
            _ => json!({ "addon": 1 }),
        },
        "owner" => json!({ "uid": choices.one_of(&[0, 1000, u32::MAX]), "gid": 0 }),
        "member" => choices.one_of(&["uid:1000", "vm:vm-1", "gid:1", "uid:x", "vm:", "uid:4294967296", "x"]).into(),
        "verb" => choices.one_of(&["use", "write", "publish", "admin", "x"]).into(),
        "on" => if choices.sometimes() { text(choices) } else { choices.one_of(&OBJECTS).to_owned() }.into(),
        _ => name(choices).into(),
    }
}

/// A value of a kind that is not asked for, or an unusual one.
fn odd_value(choices: &mut Choices<'_>) -> Value {
    match choices.below(8) {
        0 => Value::Null,
        1 => choices.any::<i64>().into(),
        2 => choices.any::<u64>().into(),
        3 => json!(choices.any::<f32>()),
        4 => json!([name(choices)]),
        5 => json!({ "x": name(choices) }),
        6 => true.into(),
        _ => text(choices).into(),
    }
}

/// Something to be imported.
fn random_image(choices: &mut Choices<'_>) -> Body {
    let mut bytes = vec![choices.any(); choices.one_of(&[4096, 512, 0, 100, 64 << 10])];
    let mark: &[u8] = match choices.below(8) {
        5 => b"QFI\xfb\0\0\0\x03",
        6 => b"KDMV\x01\0\0\0",
        7 => b"conectix",
        _ => b"",
    };
    if let Some(start) = bytes.get_mut(..mark.len()) {
        start.copy_from_slice(mark);
    }
    bytes.into()
}
