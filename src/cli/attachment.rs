//! `pando attach`, `detach`, `attachment` and `vm`: which VM has which volume.

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::block::DeltaCache;
use crate::daemon::api::types::{Attachment as AttachmentAnswer, Owner, Role, Vm as VmAnswer};

use super::Outcome;
use super::asking::Asking;
use super::client::{Client, part};
use super::table::{ago, fields, image_or_dash, list, size, table};

/// Attach a volume to a VM: start a backend, and print the socket that its front end connects to
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pando attach web-1 --vm web-1 --os
  pando attach drivers --vm web-1 --addon drivers
  pando attach web-1 --vm web-1 --owner libvirt-qemu --print libvirt")]
pub struct Attach {
    #[command(flatten)]
    asking: Asking,
    /// The volume
    volume: String,
    /// The VM: any name of up to 40 letters, digits, '-', '_' and '.'
    #[arg(long)]
    vm: String,
    /// It is the VM's operating system: the disk's serial number is 'os'
    #[arg(long, group = "role")]
    os: bool,
    /// It is an add-on: the disk's serial number is 'addon-NAME'
    #[arg(long, group = "role", value_name = "NAME")]
    addon: Option<String>,
    /// It is the VM's private data: the disk's serial number is 'private'
    #[arg(long, group = "role")]
    private: bool,
    /// How many virtqueues are offered (16)
    #[arg(long)]
    queues: Option<u16>,
    /// The VMM loads the guest's kernel itself, with no firmware: every driver that starts from nothing is then a boot
    #[arg(long)]
    kernel_from_vmm: bool,
    /// By what the delta's data goes to the disk: through the host's page cache (writeback), or past it (direct), for guests that have
    /// caches of their own (writeback)
    #[arg(long, value_name = "WAY")]
    delta_cache: Option<DeltaCache>,
    /// Give the socket to another user, as whom the VMM runs: a name such as libvirt-qemu, or UID:GID
    #[arg(long, value_name = "USER")]
    owner: Option<String>,
    /// Print what this VMM needs to be told of the disk, in place of the socket alone
    #[arg(long, value_enum, value_name = "VMM")]
    print: Option<Vmm>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Vmm {
    Qemu,
    CloudHypervisor,
    Firecracker,
    Libvirt,
}

/// Detach a volume from a VM: what the guest wrote is durable afterwards
#[derive(clap::Args)]
pub struct Detach {
    #[command(flatten)]
    asking: Asking,
    /// The volume
    volume: String,
    /// The VM; not needed when only one has it
    #[arg(long)]
    vm: Option<String>,
}

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Attachment {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: AttachmentVerb,
}

#[derive(clap::Subcommand)]
enum AttachmentVerb {
    /// List who has what, from which image, and what comes at the next boot
    List,
    /// Show one attachment
    Show {
        /// The VM
        vm: String,
        /// The volume
        volume: String,
    },
    /// Try once more, at once, where too many workers have died and none is started for a while
    Resume {
        /// The VM
        vm: String,
        /// The volume
        volume: String,
    },
}

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Vm {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: VmVerb,
}

#[derive(clap::Subcommand)]
enum VmVerb {
    /// List VMs: which version of the operating system each runs, and which comes at the next boot
    List,
}

impl Attach {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        let role = match (self.os, self.addon, self.private) {
            (true, ..) => Some(Role::Os),
            (_, Some(name), _) => Some(Role::Addon(name)),
            (.., true) => Some(Role::Private),
            _ => None,
        };
        let owner = self.owner.as_deref().map(owner_of).transpose()?;
        let request = json!({
            "volume": self.volume,
            "owner": owner,
            "vm": self.vm,
            "role": role,
            "queues": self.queues,
            "kernel_from_vmm": self.kernel_from_vmm,
            "delta_cache": self.delta_cache,
        });
        let answer: Value = client.post("/v1/attachments", Some(request))?;
        self.asking.show(answer, |attachment: AttachmentAnswer| match self.print {
            None => attachment.socket + "\n",
            Some(vmm) => lines_for(vmm, &attachment),
        })?;
        Ok(Outcome::Done)
    }
}

/// A user by its name in the host's list, or by numbers.
fn owner_of(user: &str) -> anyhow::Result<Owner> {
    let numbers = |uid: &str, gid: &str| Some(Owner { uid: uid.parse().ok()?, gid: gid.parse().ok()? });
    if let Some(owner) = user.split_once(':').and_then(|(uid, gid)| numbers(uid, gid)) {
        return Ok(owner);
    }
    let users = std::fs::read_to_string("/etc/passwd").context("cannot read the list of users")?;
    let found = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next() == Some(user);
        let (uid, gid) = (fields.nth(1)?, fields.next()?);
        is_it.then(|| numbers(uid, gid)).flatten()
    });
    found.with_context(|| format!("there is no user '{user}' here: expected a name of /etc/passwd, or UID:GID"))
}

/// What a VMM needs to be told of a disk. The guest's memory has to be shared with the backend, which is the VM's own affair: said once for
/// all its disks.
fn lines_for(vmm: Vmm, attachment: &AttachmentAnswer) -> String {
    let AttachmentAnswer { socket, volume, read_only, .. } = attachment;
    match vmm {
        Vmm::Qemu => format!(
            "# once for the VM, with its own memory size:\n\
             -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem\n\
             # for this disk:\n\
             -chardev socket,id=char-{volume},path={socket},reconnect=1 -device vhost-user-blk-pci,chardev=char-{volume},id=disk-{volume}\n"
        ),
        Vmm::CloudHypervisor => format!(
            "# once for the VM, with its own memory size:\n\
             --memory size=1G,shared=on\n\
             # for this disk (all disks stand behind one --disk):\n\
             --disk vhost_user=true,socket={socket},id=disk-{volume}\n"
        ),
        Vmm::Firecracker => {
            let id = volume.replace(|character: char| !character.is_ascii_alphanumeric(), "_");
            let drive = json!({ "drive_id": id, "is_root_device": false, "cache_type": "Writeback", "socket": socket });
            format!(
                "# PUT /drives/{id} before the VM starts (Firecracker shares its memory by itself then):\n{drive}\n"
            )
        }
        Vmm::Libvirt => {
            let read_only = if *read_only { "  <readonly/>\n" } else { "" };
            format!(
                "<!-- once for the domain: -->\n\
                 <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n\
                 <!-- for this disk, with a target of its own: -->\n\
                 <disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw'/>\n  <source type='unix' path='{socket}'>\n    \
                 <reconnect enabled='yes' timeout='1'/>\n  </source>\n  <target dev='vda' bus='virtio'/>\n{read_only}</disk>\n"
            )
        }
    }
}

impl Detach {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        let vm = match self.vm {
            Some(vm) => vm,
            None => only_vm(&client, &self.volume)?,
        };
        client.delete(&format!("/v1/attachments/{}/{}", part(&vm), part(&self.volume)))?;
        Ok(Outcome::Done)
    }
}

fn only_vm(client: &Client, volume: &str) -> anyhow::Result<String> {
    let attachments: Vec<AttachmentAnswer> = client.get("/v1/attachments")?;
    let mut vms = attachments.into_iter().filter(|attachment| attachment.volume == volume).map(|found| found.vm);
    let first = vms.next().with_context(|| format!("no VM has the volume '{volume}'"))?;
    let more: Vec<String> = vms.collect();
    if !more.is_empty() {
        bail!("several VMs have the volume '{volume}' ({first} {}): say which with --vm", more.join(" "));
    }
    Ok(first)
}

impl Attachment {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        match self.verb {
            AttachmentVerb::List => self.asking.show(client.get("/v1/attachments")?, list_text)?,
            AttachmentVerb::Show { vm, volume } => {
                let path = format!("/v1/attachments/{}/{}", part(&vm), part(&volume));
                self.asking.show(client.get(&path)?, show_text)?;
            }
            AttachmentVerb::Resume { vm, volume } => {
                let path = format!("/v1/attachments/{}/{}/resume", part(&vm), part(&volume));
                let _: Value = client.post(&path, None)?;
            }
        }
        Ok(Outcome::Done)
    }
}

fn list_text(attachments: Vec<AttachmentAnswer>) -> String {
    let row = |attachment: AttachmentAnswer| {
        [
            attachment.vm,
            attachment.volume,
            attachment.serial,
            image_or_dash(&attachment.image),
            image_or_dash(&attachment.staged),
            attachment.state,
            if attachment.connected { "yes" } else { "no" }.to_owned(),
            attachment.socket,
        ]
    };
    let headings = ["VM", "VOLUME", "SERIAL", "IMAGE", "NEXT BOOT", "STATE", "CONNECTED", "SOCKET"];
    table(headings, attachments.into_iter().map(row), "nothing is attached; 'pando attach' does that")
}

fn show_text(attachment: AttachmentAnswer) -> String {
    fields([
        ("VM", attachment.vm),
        ("volume", attachment.volume),
        ("serial", attachment.serial),
        ("socket", attachment.socket),
        ("size", size(attachment.bytes)),
        ("read-only", if attachment.read_only { "yes" } else { "no" }.to_owned()),
        ("delta cache", attachment.delta_cache.map_or("-".to_owned(), |cache| cache.to_string())),
        ("image", image_or_dash(&attachment.image)),
        ("next boot", image_or_dash(&attachment.staged)),
        ("previous", image_or_dash(&attachment.previous)),
        ("state", attachment.state),
        ("error", attachment.error.unwrap_or_else(|| "-".to_owned())),
        ("connected", if attachment.connected { "yes" } else { "no" }.to_owned()),
        ("process", attachment.process.map_or("-".to_owned(), |process| process.to_string())),
        ("restarts", attachment.restarts.to_string()),
        ("attached", format!("{} by {}", ago(attachment.attached_at), attachment.attached_by)),
    ])
}

impl Vm {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let VmVerb::List = self.verb;
        let row = |vm: VmAnswer| {
            [vm.name, image_or_dash(&vm.os), image_or_dash(&vm.os_staged), list(&vm.volumes), list(&vm.groups)]
        };
        self.asking.show(self.asking.client()?.get("/v1/vms")?, |vms: Vec<VmAnswer>| {
            let headings = ["VM", "RUNS", "NEXT BOOT", "VOLUMES", "GROUPS"];
            table(headings, vms.into_iter().map(row), "no VM has a volume; 'pando attach' does that")
        })?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_the_socket_and_share_memory() {
        let attachment: AttachmentAnswer = serde_json::from_value(json!({
            "volume": "a.b", "vm": "v", "role": null, "serial": "os", "socket": "/run/pando/vm/v/a.b.sock", "read_only": true,
            "delta_cache": null, "bytes": 1, "image": null, "staged": null, "previous": null, "state": "running", "error": null, "connected": false,
            "process": 1, "restarts": 0, "attached_at": 0, "attached_by": "uid:0",
        }))
        .unwrap();
        for (vmm, shares) in [
            (Vmm::Qemu, "share=on"),
            (Vmm::CloudHypervisor, "shared=on"),
            (Vmm::Firecracker, "\"socket\""),
            (Vmm::Libvirt, "mode='shared'"),
        ] {
            let lines = lines_for(vmm, &attachment);
            assert!(lines.contains("/run/pando/vm/v/a.b.sock") && lines.contains(shares), "{lines}");
        }
        assert!(lines_for(Vmm::Firecracker, &attachment).contains("/drives/a_b "));
    }
}
