//! Channels: names that point to images, moved in one atomic step, with history and a way back.

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{Channel, ChannelMove, ImageRef, Verb};
use super::catalog::{ChannelRow, Facts};
use super::error::Error;
use super::host::{image_ref, image_ref_of};
use super::images::{find_image, object_of_image, usable_image};
use super::names::{check_channel, nearest, shown};
use super::volumes::is_behind;
use crate::digest::Digest;

/// A channel, or the nearest name.
pub fn find_channel(facts: &Facts<'_>, name: &str) -> Result<ChannelRow, Error> {
    match facts.channel(name)? {
        Some(channel) => Ok(channel),
        None => {
            let names = facts.channels()?.into_iter().map(|channel| channel.name);
            Err(Error::NotFound { kind: "channel", name: shown(name), nearest: nearest(name, names) })
        }
    }
}

/// Where a channel pointed, the oldest first, without what was rolled back.
fn way(facts: &Facts<'_>, name: &str) -> Result<Vec<Digest>, Error> {
    let mut way = Vec::new();
    for step in facts.moves(name)?.into_iter().rev() {
        if step.action == "rollback" {
            way.pop();
        } else {
            way.push(step.image);
        }
    }
    Ok(way)
}

impl Host {
    fn view_channel(&self, facts: &Facts<'_>, channel: &ChannelRow) -> Result<Channel, Error> {
        let followers = facts.followers(&channel.name)?;
        let mut behind = 0;
        for volume in &followers {
            behind += u64::from(is_behind(facts, volume)?);
        }
        Ok(Channel {
            name: channel.name.clone(),
            image: image_ref(facts, channel.image)?,
            moved_at: channel.moved_at,
            moved_by: channel.moved_by.clone(),
            volumes: followers.len() as u64,
            volumes_behind: behind,
        })
    }

    /// The channels that the caller may see.
    pub fn list_channels(&self, caller: &Caller) -> Result<Vec<Channel>, Error> {
        Call::look(self, caller, "channel.list", "channel:*", |call| {
            self.catalog.read(|facts| {
                call.require_any(facts, "channel")?;
                let mut seen = Vec::new();
                for channel in facts.channels()? {
                    if call.may(facts, Verb::Use, &Object::Channel(channel.name.clone()))? {
                        seen.push(self.view_channel(facts, &channel)?);
                    }
                }
                Ok(seen)
            })
        })
    }

    /// One channel.
    pub fn show_channel(&self, caller: &Caller, name: &str) -> Result<Channel, Error> {
        Call::look(self, caller, "channel.show", format!("channel:{}", shown(name)), |call| {
            self.catalog.read(|facts| {
                call.require(facts, Verb::Use, &Object::Channel(name.to_owned()))?;
                self.view_channel(facts, &find_channel(facts, name)?)
            })
        })
    }

    /// A channel's moves, the newest first.
    pub fn channel_history(&self, caller: &Caller, name: &str) -> Result<Vec<ChannelMove>, Error> {
        Call::look(self, caller, "channel.history", format!("channel:{}", shown(name)), |call| {
            self.catalog.read(|facts| {
                call.require(facts, Verb::Use, &Object::Channel(name.to_owned()))?;
                find_channel(facts, name)?;
                let view = |step: super::catalog::MoveRow| {
                    let mut versions = facts.versions(step.image)?;
                    // What it was called then, should it have no name any more.
                    versions.extend(step.version.filter(|_| versions.is_empty()));
                    Ok(ChannelMove {
                        id: step.id,
                        at: step.at,
                        by: step.by,
                        action: step.action,
                        image: ImageRef { digest: step.image.to_string(), versions },
                        previous: image_ref_of(facts, step.previous)?,
                    })
                };
                facts.moves(name)?.into_iter().map(view).collect()
            })
        })
    }

    /// Points a channel to an image.
    pub fn set_channel(&self, caller: &Caller, name: &str, image: &str) -> Result<Channel, Error> {
        check_channel(name)?;
        self.move_channel(caller, "channel.set", name, "set", |call, facts| {
            let image = find_image(facts, image)?;
            call.require(facts, Verb::Use, &object_of_image(facts, &image)?)?;
            Ok(image.digest)
        })
    }

    /// Points a channel to where it pointed before.
    pub fn roll_channel_back(&self, caller: &Caller, name: &str) -> Result<Channel, Error> {
        self.move_channel(caller, "channel.rollback", name, "rollback", |_, facts| {
            find_channel(facts, name)?;
            match way(facts, name)?.as_slice() {
                [.., previous, _] => Ok(*previous),
                _ => Err(Error::State {
                    object: format!("channel {name}"),
                    found: "has nothing before the image that it points to".to_owned(),
                    remedy: "there is nothing to go back to",
                }),
            }
        })
    }

    fn move_channel(
        &self,
        caller: &Caller,
        action: &'static str,
        name: &str,
        kind: &'static str,
        image: impl FnOnce(&Call<'_>, &Facts<'_>) -> Result<Digest, Error>,
    ) -> Result<Channel, Error> {
        Call::run(self, caller, action, format!("channel:{}", shown(name)), |call| {
            let followers = self.catalog.change(|facts| {
                call.require(facts, Verb::Publish, &Object::Channel(name.to_owned()))?;
                let image = image(call, facts)?;
                usable_image(facts, image)?;
                facts.move_channel(name, image, &caller.principal(), kind)?;
                let followers = facts.followers(name)?;
                for volume in &followers {
                    // The latest instruction counts: what deployments wanted before is over.
                    facts.set_volume_target(&volume.name, image)?;
                    facts.clear_placement_targets(&volume.name)?;
                    facts.supersede_targets(None, &volume.name)?;
                }
                facts.close_deployments()?;
                call.done(facts, format!("image {image}"))?;
                Ok::<_, Error>(followers)
            })?;
            self.event("channel.moved", &format!("channel:{name}"), kind);
            for volume in followers {
                self.converge(&volume.name);
            }
            self.catalog.read(|facts| self.view_channel(facts, &find_channel(facts, name)?))
        })
    }

    /// Removes a channel that no volume follows.
    pub fn remove_channel(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        Call::run(self, caller, "channel.rm", format!("channel:{}", shown(name)), |call| {
            self.catalog.change(|facts| {
                call.require(facts, Verb::Admin, &Object::Channel(name.to_owned()))?;
                find_channel(facts, name)?;
                let users: Vec<String> =
                    facts.followers(name)?.into_iter().map(|volume| format!("volume {}", volume.name)).collect();
                if !users.is_empty() {
                    return Err(Error::InUse {
                        object: format!("channel {name}"),
                        users,
                        remedy: "remove these first",
                    });
                }
                facts.remove_channel(name)?;
                call.done(facts, "")
            })
        })
    }
}
