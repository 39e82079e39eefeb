//! Backends that go on with the program that is installed now, and those that wait for an operator.
//!
//! Knows nothing of how a backend does it: it is given the program, and says what came of it.

use std::fs::File;
use std::sync::Arc;

use crate::sys::shared;

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{Upgraded, Verb};
use super::attachments::find_attachment;
use super::error::{Error, chain};

impl Host {
    /// Has every backend go on with the program that is installed now: keepers and workers, one after another. A guest notices a
    /// pause of milliseconds.
    pub fn upgrade(self: &Arc<Host>, caller: &Caller) -> Result<Vec<Upgraded>, Error> {
        Call::run(self, caller, "upgrade", "backends", |call| {
            call.require_admin("upgrade backends")?;
            let path = self.backends.program();
            let io = |action| {
                let path = path.display().to_string();
                move |source| Error::Io { action, path, source }
            };
            let installed = File::open(path).map_err(io("open"))?;
            // One copy for all of them, which stays what it is when the next one is installed.
            let program = shared::copy_of_program(&installed).map_err(io("copy"))?;
            let mut upgraded = Vec::new();
            for row in self.catalog.read(|facts| facts.attachments())? {
                if !self.backends.is_connected(row.id) {
                    continue;
                }
                let error = self.backends.upgrade(row.id, &program).err().map(|error| chain(&error));
                let (kind, detail) = match &error {
                    None => ("backend.upgraded", ""),
                    Some(error) => ("backend.upgrade-failed", error.as_str()),
                };
                self.attachment_event(row.id, kind, detail)?;
                upgraded.push(Upgraded { vm: row.vm, volume: row.volume, error });
            }
            let failed = upgraded.iter().filter(|upgraded| upgraded.error.is_some()).count();
            self.catalog
                .change(|facts| call.done(facts, format!("{} upgraded, {failed} not", upgraded.len() - failed)))?;
            Ok(upgraded)
        })
    }

    /// Has a backend whose workers died one after another try once more.
    pub fn resume(&self, caller: &Caller, vm: &str, name: &str) -> Result<(), Error> {
        Call::run(self, caller, "resume", format!("volume:{name}"), |call| {
            let id = self.catalog.change(|facts| {
                call.require(facts, Verb::Use, &Object::Volume(name.to_owned()))?;
                let row = find_attachment(facts, vm, name)?;
                call.done(facts, format!("VM {vm}"))?;
                Ok::<_, Error>(row.id)
            })?;
            Ok(self.backends.resume(id)?)
        })
    }
}
