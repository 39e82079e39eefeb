//! Groups: who may do what, and which VMs are deployed to together. Only root and the daemon's own user look at them and change them.

use super::Host;
use super::access::{Call, Caller};
use super::api::types::{AuditRecord, Grant, Group, LogQuery};
use super::catalog::Facts;
use super::error::Error;
use super::events::check_limit;
use super::names::{PATH_NAME_BYTES_MAX, check_name, nearest, shown};

/// A group, or the nearest name.
pub fn find_group(facts: &Facts<'_>, name: &str) -> Result<Group, Error> {
    match facts.group(name)? {
        Some(created_at) => {
            Ok(Group { name: name.to_owned(), members: facts.members(name)?, grants: facts.grants(name)?, created_at })
        }
        None => Err(Error::NotFound { kind: "group", name: shown(name), nearest: nearest(name, facts.groups()?) }),
    }
}

/// Sees that `member` can be one: `uid:1000`, `gid:100`, `vm:web-1`.
fn check_member(member: &str) -> Result<(), Error> {
    let is_number = |number: &str| number.parse::<u32>().is_ok_and(|value| value.to_string() == number);
    match member.split_once(':') {
        Some(("uid" | "gid", number)) if is_number(number) => Ok(()),
        Some(("vm", name)) => check_name("VM", name),
        _ => Err(Error::Invalid {
            field: "member",
            found: shown(member),
            expected: "uid:NUMBER, gid:NUMBER or vm:NAME".to_owned(),
        }),
    }
}

/// Sees that a grant is about something that can be: `volume:web-*`.
fn check_grant(grant: &Grant) -> Result<(), Error> {
    let fine = grant.on.split_once(':').is_some_and(|(kind, names)| {
        let names = names.strip_suffix('*').map_or((names, false), |beginning| (beginning, true));
        matches!(kind, "image" | "channel" | "volume")
            && names.0.len() <= PATH_NAME_BYTES_MAX
            && (names.1 || !names.0.is_empty())
            && names.0.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./+~:".contains(&byte))
    });
    if fine {
        return Ok(());
    }
    Err(Error::Invalid {
        field: "on",
        found: shown(&grant.on),
        expected: "image:NAME, channel:NAME or volume:NAME, or the beginning of names and '*', such as volume:web-*"
            .to_owned(),
    })
}

impl Host {
    /// All groups.
    pub fn list_groups(&self, caller: &Caller) -> Result<Vec<Group>, Error> {
        Call::look(self, caller, "group.list", "group:*", |call| {
            call.require_admin("see groups")?;
            self.catalog.read(|facts| facts.groups()?.iter().map(|name| find_group(facts, name)).collect())
        })
    }

    /// One group.
    pub fn show_group(&self, caller: &Caller, name: &str) -> Result<Group, Error> {
        Call::look(self, caller, "group.show", format!("group:{}", shown(name)), |call| {
            call.require_admin("see groups")?;
            self.catalog.read(|facts| find_group(facts, name))
        })
    }

    fn change_group<T>(
        &self,
        caller: &Caller,
        action: &'static str,
        name: &str,
        change: impl FnOnce(&Call<'_>, &Facts<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        Call::run(self, caller, action, format!("group:{}", shown(name)), |call| {
            call.require_admin("change groups")?;
            self.catalog.change(|facts| change(call, facts))
        })
    }

    /// Makes a group, if there is none.
    pub fn put_group(&self, caller: &Caller, name: &str) -> Result<Group, Error> {
        check_name("group", name)?;
        self.change_group(caller, "group.create", name, |call, facts| {
            facts.put_group(name)?;
            call.done(facts, "")?;
            find_group(facts, name)
        })
    }

    /// Removes a group.
    pub fn remove_group(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        self.change_group(caller, "group.rm", name, |call, facts| {
            find_group(facts, name)?;
            facts.remove_group(name)?;
            call.done(facts, "")
        })
    }

    /// Adds a member.
    pub fn add_member(&self, caller: &Caller, name: &str, member: &str) -> Result<Group, Error> {
        check_member(member)?;
        self.change_group(caller, "group.add", name, |call, facts| {
            find_group(facts, name)?;
            facts.add_member(name, member)?;
            call.done(facts, member)?;
            find_group(facts, name)
        })
    }

    /// Takes a member away.
    pub fn remove_member(&self, caller: &Caller, name: &str, member: &str) -> Result<Group, Error> {
        self.change_group(caller, "group.remove", name, |call, facts| {
            let group = find_group(facts, name)?;
            if !facts.remove_member(name, member)? {
                return Err(Error::NotFound {
                    kind: "member",
                    name: shown(member),
                    nearest: nearest(member, group.members),
                });
            }
            call.done(facts, member)?;
            find_group(facts, name)
        })
    }

    /// Lets a group's principals do something.
    pub fn add_grant(&self, caller: &Caller, name: &str, grant: &Grant) -> Result<Group, Error> {
        check_grant(grant)?;
        self.change_group(caller, "group.grant", name, |call, facts| {
            find_group(facts, name)?;
            facts.add_grant(name, grant)?;
            call.done(facts, format!("{} {}", grant.verb.word(), grant.on))?;
            find_group(facts, name)
        })
    }

    /// No longer lets a group's principals do something.
    pub fn remove_grant(&self, caller: &Caller, name: &str, grant: &Grant) -> Result<Group, Error> {
        self.change_group(caller, "group.revoke", name, |call, facts| {
            find_group(facts, name)?;
            let words = format!("{} {}", grant.verb.word(), shown(&grant.on));
            if !facts.remove_grant(name, grant)? {
                return Err(Error::NotFound { kind: "grant", name: words, nearest: None });
            }
            call.done(facts, words)?;
            find_group(facts, name)
        })
    }

    /// The audit log.
    pub fn audit(&self, caller: &Caller, query: &LogQuery) -> Result<Vec<AuditRecord>, Error> {
        Call::look(self, caller, "audit.list", "audit", |call| {
            call.require_admin("read the audit log")?;
            check_limit(query.limit)?;
            self.catalog.read(|facts| Ok(facts.audit(query.after, query.limit)?))
        })
    }
}
