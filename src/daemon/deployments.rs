//! Deployments: one instruction gives an image to the volumes of a whole group of VMs, and keeps count of those that have it.

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{DeployRequest, DeployState, DeployTarget, Deployment, Role, Verb};
use super::catalog::{DeploymentRow, Facts, TargetRow, VolumeRow};
use super::channels::find_channel;
use super::error::Error;
use super::groups::find_group;
use super::host::{image_ref, image_ref_of};
use super::images::{find_image, object_of_image, usable_image};
use super::names::shown;
use crate::digest::Digest;

/// The volumes of a VM that a deployment gives its image to: all with an image but add-ons.
fn deployable(facts: &Facts<'_>, vm: &str) -> Result<Vec<VolumeRow>, Error> {
    let mut found = Vec::new();
    for place in facts.placements_at(vm)? {
        if matches!(place.role, Some(Role::Addon(_) | Role::Private)) {
            continue;
        }
        found.extend(facts.volume(&place.volume)?.filter(|volume| volume.target.is_some()));
    }
    Ok(found)
}

fn find_deployment(facts: &Facts<'_>, id: i64) -> Result<DeploymentRow, Error> {
    facts.deployment(id)?.ok_or_else(|| Error::NotFound { kind: "deployment", name: id.to_string(), nearest: None })
}

impl Host {
    fn view_deployment(&self, facts: &Facts<'_>, row: DeploymentRow) -> Result<Deployment, Error> {
        let view = |target: TargetRow| {
            Ok(DeployTarget {
                vm: target.vm,
                volume: target.volume,
                state: target.state,
                error: target.error,
                previous: image_ref_of(facts, target.previous)?,
            })
        };
        let targets = facts.targets(row.id)?.into_iter().map(view).collect::<Result<_, Error>>()?;
        Ok(Deployment {
            id: row.id,
            image: image_ref(facts, row.image)?,
            channel: row.channel,
            group: row.group,
            state: row.state,
            at: row.at,
            by: row.by,
            targets,
        })
    }

    /// The deployments, the newest first, of images or channels that the caller may publish.
    pub fn list_deployments(&self, caller: &Caller) -> Result<Vec<Deployment>, Error> {
        Call::look(self, caller, "deployment.list", "deployment:*", |call| {
            self.catalog.read(|facts| {
                call.require_any(facts, "volume")?;
                let rows = facts.deployments()?.into_iter();
                let mut seen = Vec::new();
                for row in rows {
                    if self.may_deploy(call, facts, &row)? {
                        seen.push(self.view_deployment(facts, row)?);
                    }
                }
                Ok(seen)
            })
        })
    }

    /// One deployment.
    pub fn show_deployment(&self, caller: &Caller, id: i64) -> Result<Deployment, Error> {
        Call::look(self, caller, "deployment.show", format!("deployment:{id}"), |call| {
            self.catalog.read(|facts| {
                let row = find_deployment(facts, id)?;
                self.require_deploy(call, facts, &row)?;
                self.view_deployment(facts, row)
            })
        })
    }

    fn deployed_object(&self, facts: &Facts<'_>, row: &DeploymentRow) -> Result<Object, Error> {
        match (&row.channel, facts.image(row.image)?) {
            (Some(channel), _) => Ok(Object::Channel(channel.clone())),
            (None, Some(image)) => object_of_image(facts, &image),
            (None, None) => Ok(Object::Image(vec![row.image.to_string()])),
        }
    }

    fn may_deploy(&self, call: &Call<'_>, facts: &Facts<'_>, row: &DeploymentRow) -> Result<bool, Error> {
        call.may(facts, Verb::Publish, &self.deployed_object(facts, row)?)
    }

    fn require_deploy(&self, call: &Call<'_>, facts: &Facts<'_>, row: &DeploymentRow) -> Result<(), Error> {
        call.require(facts, Verb::Publish, &self.deployed_object(facts, row)?)
    }

    /// Gives an image to the volumes of a group's VMs: at their next start or boot, or, of persistent `cow` volumes, when they are rebuilt.
    pub fn deploy(&self, caller: &Caller, request: &DeployRequest) -> Result<Deployment, Error> {
        let object = request.image.as_ref().map(|image| format!("image:{}", shown(image)));
        let object = object.or(request.channel.as_ref().map(|channel| format!("channel:{}", shown(channel))));
        Call::run(self, caller, "deploy", object.unwrap_or_default(), |call| {
            let (id, volumes) = self.catalog.change(|facts| {
                let image = self.image_to_deploy(call, facts, request)?;
                find_group(facts, &request.group)?;
                let id =
                    facts.insert_deployment(image, request.channel.as_deref(), &request.group, &caller.principal())?;
                let mut volumes = Vec::new();
                for vm in facts.vms_in(&request.group)? {
                    for volume in deployable(facts, &vm)? {
                        call.require(facts, Verb::Write, &Object::Volume(volume.name.clone()))?;
                        self.target_volume(facts, id, image, &vm, &volume)?;
                        volumes.push(volume.name);
                    }
                }
                if volumes.is_empty() {
                    return Err(Error::State {
                        object: format!("group {}", request.group),
                        found: "has no VM with a volume over an image".to_owned(),
                        remedy: "add VMs with 'pando group add GROUP vm:NAME', and attach volumes to them once",
                    });
                }
                facts.close_deployments()?;
                call.done(facts, format!("deployment {id}: image {image} to group {}", request.group))?;
                Ok((id, volumes))
            })?;
            let what = request.image.as_deref().or(request.channel.as_deref()).unwrap_or_default();
            self.event(
                "deployment.started",
                &format!("deployment:{id}"),
                &format!("{what} to group {}", request.group),
            );
            volumes.iter().for_each(|volume| self.converge(volume));
            self.catalog.read(|facts| self.view_deployment(facts, find_deployment(facts, id)?))
        })
    }

    fn image_to_deploy(&self, call: &Call<'_>, facts: &Facts<'_>, request: &DeployRequest) -> Result<Digest, Error> {
        let image = match (&request.image, &request.channel) {
            (Some(name), None) => {
                call.require_any(facts, "image")?;
                let image = find_image(facts, name)?;
                call.require(facts, Verb::Publish, &object_of_image(facts, &image)?)?;
                image.digest
            }
            (None, Some(channel)) => {
                call.require(facts, Verb::Publish, &Object::Channel(channel.clone()))?;
                find_channel(facts, channel)?.image
            }
            (image, _) => {
                return Err(Error::Invalid {
                    field: "image and channel",
                    found: if image.is_some() { "both" } else { "neither" }.to_owned(),
                    expected: "one of the two".to_owned(),
                });
            }
        };
        Ok(usable_image(facts, image)?.digest)
    }

    fn target_volume(
        &self,
        facts: &Facts<'_>,
        deployment: i64,
        image: Digest,
        vm: &str,
        volume: &VolumeRow,
    ) -> Result<(), Error> {
        let attached = facts.attachment(vm, &volume.name)?;
        let present = if volume.stays() { volume.image } else { attached.as_ref().and_then(|attached| attached.image) };
        let previous_target = facts.placement(vm, &volume.name)?.and_then(|place| place.target);
        facts.supersede_targets(Some(vm), &volume.name)?;
        let state = match present {
            Some(present) if present == image => DeployState::Active,
            _ if volume.stays() => DeployState::NeedsRebuild,
            _ => DeployState::Staged,
        };
        facts.insert_target(&TargetRow {
            deployment,
            vm: vm.to_owned(),
            volume: volume.name.clone(),
            state,
            error: None,
            previous_target,
            previous: present.or(previous_target).or(volume.target),
        })?;
        facts.set_placement_target(vm, &volume.name, Some(image))?;
        Ok(())
    }

    /// Takes a deployment back where it has not arrived yet.
    pub fn abort_deployment(&self, caller: &Caller, id: i64) -> Result<Deployment, Error> {
        self.take_back(caller, "deployment.abort", id, "aborted", TargetRow::is_open)
    }

    /// Takes a deployment back everywhere: VMs that run its image have the previous one at their next boot.
    pub fn roll_deployment_back(&self, caller: &Caller, id: i64) -> Result<Deployment, Error> {
        let counts = |target: &TargetRow| target.is_open() || target.state == DeployState::Active;
        self.take_back(caller, "deployment.rollback", id, "rolled-back", counts)
    }

    fn take_back(
        &self,
        caller: &Caller,
        action: &'static str,
        id: i64,
        state: &'static str,
        counts: impl Fn(&TargetRow) -> bool,
    ) -> Result<Deployment, Error> {
        Call::run(self, caller, action, format!("deployment:{id}"), |call| {
            let volumes = self.catalog.change(|facts| {
                let row = find_deployment(facts, id)?;
                self.require_deploy(call, facts, &row)?;
                if !matches!(row.state.as_str(), "rolling" | "done") || state == "aborted" && row.state == "done" {
                    return Err(Error::State {
                        object: format!("deployment {id}"),
                        found: format!("is {}", row.state),
                        remedy: "only one that is rolling can be aborted, and one that is rolling or done be rolled back",
                    });
                }
                let mut volumes = Vec::new();
                for target in facts.targets(id)?.into_iter().filter(&counts) {
                    // Where a later instruction has another word, that stays.
                    let place = facts.placement(&target.vm, &target.volume)?;
                    if place.is_none_or(|place| place.target != Some(row.image)) {
                        continue;
                    }
                    let previous = match target.previous_target {
                        Some(previous) => facts.image(previous)?.map(|_| previous),
                        None => self.previous_target(facts, &target)?,
                    };
                    facts.set_placement_target(&target.vm, &target.volume, previous)?;
                    let state = if target.is_open() { DeployState::Aborted } else { DeployState::Superseded };
                    facts.set_target_state(&target, state)?;
                    volumes.push(target.volume);
                }
                facts.set_deployment_state(id, state)?;
                call.done(facts, format!("{} volumes", volumes.len()))?;
                Ok::<_, Error>(volumes)
            })?;
            self.event(&format!("deployment.{state}"), &format!("deployment:{id}"), "");
            volumes.iter().for_each(|volume| self.converge(volume));
            self.catalog.read(|facts| self.view_deployment(facts, find_deployment(facts, id)?))
        })
    }

    /// What a volume is to go back to that had no target of its own: its volume's, unless what it ran was another one that is still here.
    fn previous_target(&self, facts: &Facts<'_>, target: &TargetRow) -> Result<Option<Digest>, Error> {
        let of_volume = facts.volume(&target.volume)?.and_then(|volume| volume.target);
        match target.previous {
            Some(previous) if Some(previous) != of_volume => Ok(facts.image(previous)?.map(|_| previous)),
            _ => Ok(None),
        }
    }
}
