//! Who may do what: callers, the objects of grants, and the audit log that every decision goes to.
//!
//! Default deny. Root and the daemon's own user may everything; others what their groups' grants say.

use std::cell::Cell;

use super::Host;
use super::api::types::Verb;
use super::catalog::{AuditEntry, Facts};
use super::error::{Error, chain};
use super::names::recorded;

/// Who calls, as the kernel says it of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub uid: u32,
    /// The user's groups on the host, the primary one first.
    pub gids: Vec<u32>,
    /// The process.
    pub process: u32,
}

impl Caller {
    /// As it stands in logs and records.
    pub fn principal(&self) -> String {
        format!("uid:{}", self.uid)
    }

    /// What it is known by as a member of groups.
    fn principals(&self) -> impl Iterator<Item = String> {
        std::iter::once(self.principal()).chain(self.gids.iter().map(|gid| format!("gid:{gid}")))
    }
}

/// What a grant can be for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// An image, by all its names: its digest and its versions.
    Image(Vec<String>),
    /// A channel.
    Channel(String),
    /// A volume.
    Volume(String),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::Image(_) => "image",
            Object::Channel(_) => "channel",
            Object::Volume(_) => "volume",
        }
    }

    fn names(&self) -> &[String] {
        match self {
            Object::Image(names) => names,
            Object::Channel(name) | Object::Volume(name) => std::slice::from_ref(name),
        }
    }

    /// Whether a grant's pattern, `volume:web-*`, is about this.
    fn fits(&self, pattern: &str) -> bool {
        let Some(names) = pattern.strip_prefix(self.kind()).and_then(|rest| rest.strip_prefix(':')) else {
            return false;
        };
        self.names().iter().any(|name| match names.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == names,
        })
    }
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // One that has no name yet is any.
        let name = self.names().last().filter(|name| !name.is_empty());
        write!(f, "{}:{}", self.kind(), name.map_or("*".to_owned(), |name| recorded(name)))
    }
}

/// Whether what was granted includes what is asked for.
fn includes(granted: Verb, asked: Verb) -> bool {
    granted == asked || granted == Verb::Admin || asked == Verb::Use
}

/// One request of one caller for one thing, from the decision to the line in the audit log.
pub struct Call<'h> {
    host: &'h Host,
    caller: &'h Caller,
    action: &'static str,
    object: String,
    logged: Cell<bool>,
}

impl<'h> Call<'h> {
    /// Runs `work`, and sees to it that the audit log says how it came out: a denial or failure here, and a change in the very
    /// transaction that made it, if `work` calls [`Call::done`] there.
    pub fn run<T>(
        host: &'h Host,
        caller: &'h Caller,
        action: &'static str,
        object: impl Into<String>,
        work: impl FnOnce(&Call<'h>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let call = Call::new(host, caller, action, object.into());
        let result = work(&call);
        let entry = match &result {
            Ok(_) if call.logged.get() => return result,
            Ok(_) => call.entry("done", String::new()),
            Err(error @ (Error::Denied { .. } | Error::NotAdmin { .. })) => call.entry("denied", error.to_string()),
            Err(error) => call.entry("failed", chain(error)),
        };
        host.catalog.change(|facts| facts.insert_audit(&entry))?;
        result
    }

    /// Only looks: what is allowed leaves no trace, what is denied does.
    pub fn look<T>(
        host: &'h Host,
        caller: &'h Caller,
        action: &'static str,
        object: impl Into<String>,
        work: impl FnOnce(&Call<'h>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let call = Call::new(host, caller, action, object.into());
        let result = work(&call);
        if let Err(error @ (Error::Denied { .. } | Error::NotAdmin { .. })) = &result {
            let entry = call.entry("denied", error.to_string());
            host.catalog.change(|facts| facts.insert_audit(&entry))?;
        }
        result
    }

    fn new(host: &'h Host, caller: &'h Caller, action: &'static str, object: String) -> Call<'h> {
        // A name that cannot be one does not fill the log.
        let object = match object.split_once(':') {
            Some((kind, name)) => format!("{kind}:{}", recorded(name)),
            None => recorded(&object),
        };
        Call { host, caller, action, object, logged: Cell::new(false) }
    }

    /// Who calls.
    pub fn caller(&self) -> &Caller {
        self.caller
    }

    /// Notes in the audit log, in the transaction of the change, that it was made.
    pub fn done(&self, facts: &Facts<'_>, detail: impl Into<String>) -> Result<(), Error> {
        self.logged.set(true);
        Ok(facts.insert_audit(&self.entry("done", detail.into()))?)
    }

    fn entry(&self, outcome: &'static str, detail: String) -> AuditEntry {
        AuditEntry {
            principal: self.caller.principal(),
            process: self.caller.process,
            action: self.action,
            object: self.object.clone(),
            outcome,
            detail,
        }
    }

    /// Whether the caller may everything.
    pub fn is_admin(&self) -> bool {
        self.host.is_admin(self.caller)
    }

    /// Sees that the caller may everything.
    pub fn require_admin(&self, what: &'static str) -> Result<(), Error> {
        if self.is_admin() { Ok(()) } else { Err(Error::NotAdmin { principal: self.caller.principal(), what }) }
    }

    /// Sees that the caller may do `verb` with `object`.
    pub fn require(&self, facts: &Facts<'_>, verb: Verb, object: &Object) -> Result<(), Error> {
        if self.may(facts, verb, object)? {
            return Ok(());
        }
        Err(Error::Denied { principal: self.caller.principal(), verb: verb.word(), object: object.to_string() })
    }

    /// Whether the caller may do `verb` with `object`.
    pub fn may(&self, facts: &Facts<'_>, verb: Verb, object: &Object) -> Result<bool, Error> {
        if self.is_admin() {
            return Ok(true);
        }
        for principal in self.caller.principals() {
            let grants = facts.grants_of(&principal)?;
            if grants.iter().any(|grant| includes(grant.verb, verb) && object.fits(&grant.on)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sees that the caller may do something with some object of a kind (`image`, `channel`, `volume`): who may not is not even told
    /// which there are.
    pub fn require_any(&self, facts: &Facts<'_>, kind: &'static str) -> Result<(), Error> {
        if self.is_admin() {
            return Ok(());
        }
        for principal in self.caller.principals() {
            if facts.grants_of(&principal)?.iter().any(|grant| grant.on.starts_with(kind)) {
                return Ok(());
            }
        }
        Err(Error::Denied { principal: self.caller.principal(), verb: "use", object: format!("any {kind}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_whole_names_or_their_beginnings() {
        let volume = Object::Volume("web-1".to_owned());
        for (pattern, fits) in [
            ("volume:web-1", true),
            ("volume:web-*", true),
            ("volume:*", true),
            ("volume:web-", false),
            ("volume:web-10", false),
            ("image:web-1", false),
            ("volumes:web-1", false),
            ("*", false),
        ] {
            assert_eq!(volume.fits(pattern), fits, "{pattern}");
        }
        let image = Object::Image(vec!["ab".repeat(32), "debian-12.7".to_owned()]);
        assert!(image.fits("image:debian-12*") && image.fits("image:abab*") && !image.fits("image:debian-13*"));
    }

    #[test]
    fn admin_includes_all_and_all_include_use() {
        assert!(
            includes(Verb::Admin, Verb::Publish)
                && includes(Verb::Write, Verb::Use)
                && includes(Verb::Publish, Verb::Use)
        );
        assert!(
            !includes(Verb::Use, Verb::Write)
                && !includes(Verb::Write, Verb::Publish)
                && !includes(Verb::Publish, Verb::Write)
        );
    }
}
