//! What goes over the API, as types: requests and answers, their JSON and their schema in the OpenAPI document.
//!
//! The one description that daemon and command line share. Sizes are bytes, times are seconds since 1970 (UTC), digests are 64
//! hexadecimal digits. Knows nothing of how anything is done.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::block::DeltaCache;

/// What a volume is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeKind {
    /// An image and a private delta over it.
    Cow,
    /// An image alone; may be attached to many VMs at once.
    ReadOnly,
    /// A private delta over nothing.
    Blank,
}

/// How an image stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Its contents were seen to have its digest.
    Verified,
    /// Its contents were found not to have its digest: it is not attached any more.
    Corrupt,
}

/// An image, briefly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageRef {
    /// BLAKE3 of its contents.
    pub digest: String,
    /// The names that people gave it, such as `debian-12.7`.
    pub versions: Vec<String>,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// BLAKE3 of its contents.
    pub digest: String,
    /// The names that people gave it, such as `debian-12.7`.
    pub versions: Vec<String>,
    /// Size as a guest sees it.
    pub bytes: u64,
    /// What it takes on disk.
    pub stored_bytes: u64,
    /// Which format it was imported from.
    pub format: String,
    /// Whether it was seen to be whole.
    pub state: ImageState,
    /// When it was last seen to be whole.
    pub verified_at: i64,
    /// Whether the file system checks every page of it as it is read (fs-verity).
    pub verity: bool,
    /// When it was imported.
    pub imported_at: i64,
    /// By whom: `uid:0`.
    pub imported_by: String,
    /// Channels that point to it now.
    pub channels: Vec<String>,
    /// Volumes that are on it or will be at their next start.
    pub volumes: Vec<String>,
    /// VMs that run from it now.
    pub vms: Vec<String>,
}

/// To import an image from a file of the daemon's host. Only for callers that could read any file anyway (root, the daemon's own user);
/// others send the contents.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// Absolute path of the file.
    pub path: String,
    /// A name for people, such as `debian-12.7`. One that exists moves to the new image.
    #[serde(default)]
    pub version: Option<String>,
    /// `raw`, `qcow2` or `vmdk`; found out by the contents when left out.
    #[serde(default)]
    pub format: Option<String>,
}

/// To import an image from the body of the request.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UploadQuery {
    /// A name for people, such as `debian-12.7`. One that exists moves to the new image.
    #[serde(default)]
    pub version: Option<String>,
    /// `raw`, `qcow2` or `vmdk`; found out by the contents when left out.
    #[serde(default)]
    pub format: Option<String>,
}

/// A channel: a name that points to an image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Channel {
    /// Such as `debian-12/stable`.
    pub name: String,
    /// Where it points.
    pub image: ImageRef,
    /// Since when.
    pub moved_at: i64,
    /// Who moved it.
    pub moved_by: String,
    /// Volumes that follow it.
    pub volumes: u64,
    /// Those of them that are not on its image yet.
    pub volumes_behind: u64,
}

/// To point a channel to an image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChannelRequest {
    /// A version, a digest, or its first 8 digits or more.
    pub image: String,
}

/// One move of a channel.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChannelMove {
    /// Counts up.
    pub id: i64,
    /// When.
    pub at: i64,
    /// By whom.
    pub by: String,
    /// `set` or `rollback`.
    pub action: String,
    /// Where it points since then.
    pub image: ImageRef,
    /// Where it pointed before.
    pub previous: Option<ImageRef>,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub kind: VolumeKind,
    /// Whether its delta lasts only until the next attach or the next image.
    pub ephemeral: bool,
    /// The channel that it follows; none when it is pinned to an image or blank.
    pub channel: Option<String>,
    /// The image that it is on; what a VM attaches to it now runs.
    pub image: Option<ImageRef>,
    /// The image that it is to be on, if another: from the next boot on, or, when `needs_rebuild`, after `rebuild`.
    pub target: Option<ImageRef>,
    /// Versions (or digests) from the one behind its image up to its target, in the order in which its channel had them.
    pub behind: Vec<String>,
    /// Whether it stays on its image until it is rebuilt: a persistent `cow` volume that is behind.
    pub needs_rebuild: bool,
    /// Size as a guest sees it.
    pub bytes: u64,
    /// What its delta takes on disk; none without one.
    pub delta_bytes: Option<u64>,
    /// `detached`, `attached` or `failed`.
    pub state: String,
    /// Who has it.
    pub vms: Vec<String>,
    /// When it was created.
    pub created_at: i64,
    /// By whom.
    pub created_by: String,
    /// What becomes of a write that finds the file system of its delta full.
    pub on_full: OnFull,
    /// How many seconds it waits before it fails.
    pub hold_timeout_s: u64,
}

/// What becomes of a write that finds the file system of a volume's delta full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It waits for room.
    #[default]
    Hold,
    /// It fails at once.
    Error,
}

/// To create a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// Its name: up to 40 letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// What it is made of.
    pub kind: VolumeKind,
    /// Pins it to an image: a version, a digest, or its first 8 digits or more.
    #[serde(default)]
    pub image: Option<String>,
    /// Lets it follow a channel.
    #[serde(default)]
    pub channel: Option<String>,
    /// Its delta lasts only until the next attach or the next image.
    #[serde(default)]
    pub ephemeral: bool,
    /// Size in bytes; the image's own when left out.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Bytes of a copy-on-write cluster, 4096 (the default) to 65536.
    #[serde(default)]
    pub cluster_bytes: Option<u64>,
    /// What becomes of a write that finds the file system of its delta full; it waits when left out.
    #[serde(default)]
    pub on_full: OnFull,
    /// How many seconds it waits before it fails, 1 to 86400; 60 when left out.
    #[serde(default)]
    pub hold_timeout_s: Option<u64>,
}

/// To make a volume larger.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GrowRequest {
    /// The new size in bytes.
    pub bytes: u64,
}

/// What a disk is to its VM, by which the guest can tell it from others: the disk's serial number says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The operating system: serial `os`.
    Os,
    /// Further software: serial `addon-NAME`.
    Addon(String),
    /// Private and writable: serial `private`.
    Private,
}

/// A volume served to a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The volume.
    pub volume: String,
    /// The VM.
    pub vm: String,
    /// What it is to the VM.
    pub role: Option<Role>,
    /// The disk's serial number.
    pub serial: String,
    /// Where a front end connects.
    pub socket: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// By what its delta's data goes to the disk, if it has one: `writeback`, or `direct`.
    #[schema(value_type = Option<String>)]
    pub delta_cache: Option<DeltaCache>,
    /// Size as the guest sees it.
    pub bytes: u64,
    /// The image that the VM runs from now.
    pub image: Option<ImageRef>,
    /// The image that it will have from its next boot on.
    pub staged: Option<ImageRef>,
    /// The image that it had before this one.
    pub previous: Option<ImageRef>,
    /// `running`, `restarting` or `failed`.
    pub state: String,
    /// Why, when it has failed.
    pub error: Option<String>,
    /// Whether a front end is connected.
    pub connected: bool,
    /// The backend's process.
    pub process: Option<u32>,
    /// How often the backend was started again after its death.
    pub restarts: u64,
    /// When it was attached.
    pub attached_at: i64,
    /// By whom.
    pub attached_by: String,
}

/// To attach a volume to a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The volume.
    pub volume: String,
    /// The VM: any name of up to 40 letters, digits, `-`, `_` and `.`.
    pub vm: String,
    /// What it is to the VM.
    #[serde(default)]
    pub role: Option<Role>,
    /// How many virtqueues are offered; 16 when left out.
    #[serde(default)]
    pub queues: Option<u16>,
    /// The VMM itself loads the guest's kernel: every driver that starts from nothing is then a boot.
    #[serde(default)]
    pub kernel_from_vmm: bool,
    /// By what the delta's data goes to the disk and comes from there: through the page cache (`writeback`, when left out), or past it (`direct`).
    #[serde(default)]
    #[schema(value_type = Option<String>, pattern = "^(writeback|direct)$")]
    pub delta_cache: Option<DeltaCache>,
    /// Whose the socket is to be, the caller's own when left out. Only root and the daemon's own user give it to others.
    #[serde(default)]
    pub owner: Option<Owner>,
}

/// A user and a group of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// A VM, as its attachments show it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The image of its operating system.
    pub os: Option<ImageRef>,
    /// The image that it will have from its next boot on.
    pub os_staged: Option<ImageRef>,
    /// Volumes attached to it.
    pub volumes: Vec<String>,
    /// Groups that it is in.
    pub groups: Vec<String>,
}

/// To deploy an image to the VMs of a group.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeployRequest {
    /// The image: a version, a digest, or its first 8 digits or more.
    #[serde(default)]
    pub image: Option<String>,
    /// The channel whose present image is deployed, in place of an image.
    #[serde(default)]
    pub channel: Option<String>,
    /// The group whose VMs get it.
    pub group: String,
}

/// How far one volume of a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeployState {
    /// The image is on this host and verified, and the volume gets it at its VM's next start or boot.
    Staged,
    /// The VM runs it, or the volume is on it.
    Active,
    /// A persistent `cow` volume: it gets it when it is rebuilt.
    NeedsRebuild,
    /// It could not be served; the VM goes on with what it had.
    Failed,
    /// A later instruction gave the volume another image.
    Superseded,
    /// The deployment was aborted or rolled back before the volume had it.
    Aborted,
    /// The volume was removed.
    Removed,
}

/// One volume of a deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeployTarget {
    /// The VM.
    pub vm: String,
    /// Its volume.
    pub volume: String,
    /// How far it is.
    pub state: DeployState,
    /// Why, when it has failed.
    pub error: Option<String>,
    /// What it had before.
    pub previous: Option<ImageRef>,
}

/// A deployment: one instruction for a set of VMs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Deployment {
    /// Counts up.
    pub id: i64,
    /// What is deployed.
    pub image: ImageRef,
    /// The channel that named it, if one did.
    pub channel: Option<String>,
    /// To which group's VMs.
    pub group: String,
    /// `rolling`, `done`, `aborted` or `rolled-back`.
    pub state: String,
    /// When.
    pub at: i64,
    /// By whom.
    pub by: String,
    /// Each volume.
    pub targets: Vec<DeployTarget>,
}

/// What a group's principals may do with certain objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Grant {
    /// What: `use`, `write`, `publish` or `admin`.
    pub verb: Verb,
    /// With what: `image:`, `channel:` or `volume:` and a name, or the beginning of names and `*`: `volume:web-*`.
    pub on: String,
}

/// What may be done. `admin` includes the others; `write` and `publish` include `use`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// See it; attach it read-only; create volumes over it.
    Use,
    /// Create, attach for writing, detach, reset, rebuild, grow and remove volumes.
    Write,
    /// Import images, move channels, deploy.
    Publish,
    /// All of it, and remove images and channels.
    Admin,
}

/// A group: principals with grants, and VMs to deploy to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// `uid:1000`, `gid:100`, `vm:web-1`.
    pub members: Vec<String>,
    /// What its principals may do.
    pub grants: Vec<Grant>,
    /// When it was created.
    pub created_at: i64,
}

/// A member of a group.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberRequest {
    /// `uid:1000`, `gid:100` or `vm:web-1`.
    pub member: String,
}

/// One line of the audit log.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AuditRecord {
    /// Counts up.
    pub id: i64,
    /// When.
    pub at: i64,
    /// Who: `uid:1000`, or `daemon`.
    pub principal: String,
    /// The caller's process; 0 when unknown.
    pub process: u32,
    /// What was asked for, such as `volume.create`.
    pub action: String,
    /// Of what, such as `volume:web-1`.
    pub object: String,
    /// `done`, `denied` or `failed`.
    pub outcome: String,
    /// More of it.
    pub detail: String,
}

/// Something that happened.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts up.
    pub id: i64,
    /// When.
    pub at: i64,
    /// What kind, such as `backend.died`.
    pub kind: String,
    /// To what, such as `attachment:vm1/root`.
    pub object: String,
    /// More of it.
    pub detail: String,
}

/// Which part of a log is asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// Records behind this one; from the oldest when left out.
    #[serde(default)]
    pub after: Option<i64>,
    /// The newest so many of them, at most 1000 (the default).
    #[serde(default)]
    #[param(maximum = 1000)]
    pub limit: Option<u32>,
}

/// Which events are asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Events behind this one; from the oldest when left out.
    #[serde(default)]
    pub after: Option<i64>,
    /// The newest so many of them, at most 1000 (the default).
    #[serde(default)]
    #[param(maximum = 1000)]
    pub limit: Option<u32>,
    /// Go on: the answer is a line of JSON for each event, as they happen, without end.
    #[serde(default)]
    pub follow: bool,
}

/// How a long operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// At work.
    Running,
    /// Done.
    Done,
    /// Not done, and why is in `error`.
    Failed,
    /// Stopped on request.
    Cancelled,
}

/// A long operation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Counts up.
    pub id: i64,
    /// `image.import` or `image.verify`.
    pub kind: String,
    /// What it works on.
    pub object: String,
    /// How it stands.
    pub state: JobState,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do in all; 0 while unknown.
    pub total_bytes: u64,
    /// Seconds that are left, at the pace until now.
    pub eta_seconds: Option<u64>,
    /// What came of it: an image's digest.
    pub result: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was started.
    pub started_at: i64,
    /// By whom.
    pub started_by: String,
}

/// How long to wait for a job's end.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// Answer when the job has ended or made progress, or after so many milliseconds, at most 30000; at once when left out.
    #[serde(default)]
    #[param(maximum = 30000)]
    pub wait_ms: Option<u64>,
}

/// The daemon itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its process.
    pub process: u32,
    /// The user that it runs as.
    pub uid: u32,
    /// Since when it runs.
    pub started_at: i64,
    /// How often it has been started on this state directory.
    pub starts: u64,
    /// Images on this host.
    pub images: u64,
    /// Volumes.
    pub volumes: u64,
    /// Attachments.
    pub attachments: u64,
    /// Jobs at work.
    pub jobs_running: u64,
    /// How many volumes are not on their target image yet.
    pub volumes_behind: u64,
    /// The daemon's own resident private memory in bytes.
    pub memory_bytes: u64,
}

/// A backend that was to go on with another program.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Upgraded {
    /// The VM.
    pub vm: String,
    /// The volume.
    pub volume: String,
    /// Why it goes on with the old one, if it does.
    pub error: Option<String>,
}

/// One volume's load, for `pando top`: counts since it was attached.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Load {
    /// The volume.
    pub volume: String,
    /// The VM.
    pub vm: String,
    /// Read requests.
    pub reads: u64,
    /// Write requests, with discards and write-zeroes.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Nanoseconds that requests took in all.
    pub latency_ns: u64,
    /// What the delta takes on disk.
    pub delta_bytes: u64,
}

/// What went wrong (RFC 9457).
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `about:blank#` and a word that programs can branch on, such as `not-found`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The word, for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was expected, what was found, and what to do.
    pub detail: String,
}
