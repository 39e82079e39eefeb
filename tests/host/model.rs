//! Random calls of the API against a model of what a host has: after each, the answer and all lists are what the model says.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use super::daemon::Daemon;

const IMAGE_BYTES: u64 = 64 << 10;
const IMAGES: [&str; 2] = ["one", "two"];

/// A call.
#[derive(Clone, Debug)]
enum Step {
    SetChannel { channel: u8, image: u8 },
    RollBack { channel: u8 },
    RemoveChannel { channel: u8 },
    Create { volume: u8, kind: Kind, source: Source },
    Remove { volume: u8 },
    Attach { volume: u8, vm: u8 },
    Detach { volume: u8, vm: u8 },
    Rebuild { volume: u8 },
    Reset { volume: u8 },
    Grow { volume: u8, clusters: u8 },
    Restart,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Cow,
    Ephemeral,
    ReadOnly,
    Blank,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Image(u8),
    Channel(u8),
}

#[derive(Clone, Debug)]
struct Volume {
    kind: Kind,
    source: Source,
    /// What a persistent one's delta is on.
    on: Option<u8>,
    target: Option<u8>,
    bytes: Option<u64>,
    /// Who has it, and on which image.
    vms: BTreeMap<u8, Option<u8>>,
}

impl Volume {
    fn is_writable(&self) -> bool {
        self.kind != Kind::ReadOnly
    }

    fn is_kept(&self) -> bool {
        matches!(self.kind, Kind::Cow | Kind::Blank)
    }

    /// What an attach gives now.
    fn offered(&self) -> Option<u8> {
        if self.kind == Kind::Cow { self.on } else { self.target }
    }
}

/// What a host has.
#[derive(Default)]
struct Model {
    channels: BTreeMap<u8, Vec<u8>>,
    volumes: BTreeMap<u8, Volume>,
}

fn channel_name(channel: u8) -> String {
    format!("c/{channel}")
}

fn volume_name(volume: u8) -> String {
    format!("v{volume}")
}

impl Model {
    fn move_channel(&mut self, channel: u8, image: u8) {
        for volume in self.volumes.values_mut().filter(|volume| volume.source == Source::Channel(channel)) {
            if volume.kind != Kind::Blank {
                volume.target = Some(image);
            }
        }
    }

    /// Does a step, and says how it is to be answered.
    fn step(&mut self, step: &Step) -> u16 {
        match *step {
            Step::SetChannel { channel, image } => {
                self.channels.entry(channel).or_default().push(image);
                self.move_channel(channel, image);
                200
            }
            Step::RollBack { channel } => {
                let Some(way) = self.channels.get_mut(&channel) else { return 404 };
                if way.len() < 2 {
                    return 409;
                }
                way.pop();
                let image = way[way.len() - 1];
                self.move_channel(channel, image);
                200
            }
            Step::RemoveChannel { channel } => {
                if !self.channels.contains_key(&channel) {
                    return 404;
                }
                let follows = |volume: &Volume| volume.kind != Kind::Blank && volume.source == Source::Channel(channel);
                if self.volumes.values().any(follows) {
                    return 409;
                }
                self.channels.remove(&channel);
                204
            }
            Step::Create { volume, kind, source } => {
                let image = match source {
                    _ if kind == Kind::Blank => None,
                    Source::Image(image) => Some(image),
                    Source::Channel(channel) => match self.channels.get(&channel) {
                        Some(way) => way.last().copied(),
                        None => return 404,
                    },
                };
                if self.volumes.contains_key(&volume) {
                    return 409;
                }
                let on = image.filter(|_| kind == Kind::Cow);
                let bytes = (kind == Kind::Blank).then_some(IMAGE_BYTES);
                self.volumes.insert(volume, Volume { kind, source, on, target: image, bytes, vms: BTreeMap::new() });
                201
            }
            Step::Remove { volume } => {
                let Some(found) = self.volumes.get(&volume) else { return 404 };
                if !found.vms.is_empty() {
                    return 409;
                }
                self.volumes.remove(&volume);
                204
            }
            Step::Attach { volume, vm } => {
                let Some(found) = self.volumes.get_mut(&volume) else { return 404 };
                if found.vms.contains_key(&vm) || found.is_writable() && !found.vms.is_empty() {
                    return 409;
                }
                found.vms.insert(vm, found.offered());
                201
            }
            Step::Detach { volume, vm } => {
                let Some(found) = self.volumes.get_mut(&volume) else { return 404 };
                if found.vms.remove(&vm).is_some() { 204 } else { 404 }
            }
            Step::Rebuild { volume } | Step::Reset { volume } => {
                let rebuilds = matches!(step, Step::Rebuild { .. });
                let Some(found) = self.volumes.get_mut(&volume) else { return 404 };
                if !found.is_kept() || !found.vms.is_empty() || rebuilds && found.kind == Kind::Blank {
                    return 409;
                }
                if rebuilds {
                    found.on = found.target;
                }
                200
            }
            Step::Grow { volume, clusters } => {
                let bytes = u64::from(clusters) * 4096;
                let Some(found) = self.volumes.get_mut(&volume) else { return 404 };
                if !found.is_writable() {
                    return 409;
                }
                if bytes < found.bytes.unwrap_or(0).max(IMAGE_BYTES) {
                    return 422;
                }
                found.bytes = Some(bytes);
                200
            }
            Step::Restart => 0,
        }
    }

    /// Volumes as a list of them shows: name, image, target if another, size, VMs.
    fn volumes(&self) -> Vec<Value> {
        let version = |image: Option<u8>| image.map(|image| IMAGES[usize::from(image)]);
        let view = |(name, volume): (&u8, &Volume)| {
            let behind = volume.vms.values().find(|image| **image != volume.target);
            let attached = behind.or(volume.vms.values().next()).copied();
            let on = if volume.kind == Kind::Cow { volume.on } else { attached.unwrap_or(volume.target) };
            let vms: Vec<String> = volume.vms.keys().map(|vm| format!("m{vm}")).collect();
            json!([
                volume_name(*name),
                version(on),
                version(volume.target.filter(|_| on != volume.target)),
                volume.bytes.unwrap_or(0).max(if volume.kind == Kind::Blank { 0 } else { IMAGE_BYTES }),
                vms,
            ])
        };
        self.volumes.iter().map(view).collect()
    }
}

fn ask(daemon: &mut Daemon, step: &Step) -> u16 {
    let send = |daemon: &Daemon, method: &str, path: String, body: Option<Value>| {
        daemon.ask(method, &path, body.as_ref()).status
    };
    let channel = |channel: u8| format!("/v1/channels/{}", channel_name(channel).replace('/', "%2F"));
    let volume = |volume: u8| format!("/v1/volumes/{}", volume_name(volume));
    match *step {
        Step::SetChannel { channel: name, image } => {
            send(daemon, "PUT", channel(name), Some(json!({ "image": IMAGES[usize::from(image)] })))
        }
        Step::RollBack { channel: name } => send(daemon, "POST", channel(name) + "/rollback", None),
        Step::RemoveChannel { channel: name } => send(daemon, "DELETE", channel(name), None),
        Step::Create { volume, kind, source } => {
            let mut body = json!({ "name": volume_name(volume), "kind": "cow", "ephemeral": kind == Kind::Ephemeral });
            match (kind, source) {
                (Kind::Blank, _) => (body["kind"], body["bytes"]) = (json!("blank"), json!(IMAGE_BYTES)),
                (_, Source::Image(image)) => body["image"] = json!(IMAGES[usize::from(image)]),
                (_, Source::Channel(name)) => body["channel"] = json!(channel_name(name)),
            }
            if kind == Kind::ReadOnly {
                body["kind"] = json!("read-only");
            }
            send(daemon, "POST", "/v1/volumes".to_owned(), Some(body))
        }
        Step::Remove { volume: name } => send(daemon, "DELETE", volume(name), None),
        Step::Attach { volume, vm } => {
            let body = json!({ "volume": volume_name(volume), "vm": format!("m{vm}") });
            send(daemon, "POST", "/v1/attachments".to_owned(), Some(body))
        }
        Step::Detach { volume, vm } => {
            send(daemon, "DELETE", format!("/v1/attachments/m{vm}/{}", volume_name(volume)), None)
        }
        Step::Rebuild { volume: name } => send(daemon, "POST", volume(name) + "/rebuild", None),
        Step::Reset { volume: name } => send(daemon, "POST", volume(name) + "/reset", None),
        Step::Grow { volume: name, clusters } => {
            send(daemon, "POST", volume(name) + "/grow", Some(json!({ "bytes": u64::from(clusters) * 4096 })))
        }
        Step::Restart => {
            daemon.kill();
            daemon.start();
            0
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![Just(Kind::Cow), Just(Kind::Ephemeral), Just(Kind::ReadOnly), Just(Kind::Blank)];
    let source = prop_oneof![(0..2u8).prop_map(Source::Image), (0..2u8).prop_map(Source::Channel)];
    let (volume, channel) = (0..3u8, 0..2u8);
    let step = prop_oneof![
        4 => (channel.clone(), 0..2u8).prop_map(|(channel, image)| Step::SetChannel { channel, image }),
        2 => channel.clone().prop_map(|channel| Step::RollBack { channel }),
        1 => channel.prop_map(|channel| Step::RemoveChannel { channel }),
        6 => (volume.clone(), kind, source).prop_map(|(volume, kind, source)| Step::Create { volume, kind, source }),
        2 => volume.clone().prop_map(|volume| Step::Remove { volume }),
        6 => (volume.clone(), 0..2u8).prop_map(|(volume, vm)| Step::Attach { volume, vm }),
        3 => (volume.clone(), 0..2u8).prop_map(|(volume, vm)| Step::Detach { volume, vm }),
        2 => volume.clone().prop_map(|volume| Step::Rebuild { volume }),
        1 => volume.clone().prop_map(|volume| Step::Reset { volume }),
        2 => (volume, 10..40u8).prop_map(|(volume, clusters)| Step::Grow { volume, clusters }),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..40)
}

#[test]
fn random_calls_do_what_a_model_says() {
    let config = Config { cases: 48, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&steps(), |steps| {
        let mut daemon = Daemon::new();
        for (number, image) in IMAGES.iter().enumerate() {
            daemon.import(image, IMAGE_BYTES as usize, number as u64);
        }
        let mut model = Model::default();
        for (number, step) in steps.iter().enumerate() {
            let expected = model.step(step);
            prop_assert_eq!(ask(&mut daemon, step), expected, "step {}: {:?}", number, step);
            let version = |image: &Value| image["versions"][0].clone();
            let view = |volume: &Value| {
                json!([
                    volume["name"],
                    version(&volume["image"]),
                    version(&volume["target"]),
                    volume["bytes"],
                    volume["vms"]
                ])
            };
            let found: Vec<Value> = daemon.get("/v1/volumes").as_array().expect("a list").iter().map(view).collect();
            prop_assert_eq!(found, model.volumes(), "after step {}: {:?}", number, step);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
