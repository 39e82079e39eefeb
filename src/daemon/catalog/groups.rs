//! Groups: their members and what these may do.

use crate::daemon::api::types::{Grant, Verb};

use super::{CatalogError, Facts, now, words};

words!(Verb { Use = "use", Write = "write", Publish = "publish", Admin = "admin" });

impl Facts<'_> {
    /// Whether there is such a group, and since when.
    pub fn group(&self, name: &str) -> Result<Option<i64>, CatalogError> {
        self.one("SELECT at FROM grp WHERE name = ?1", [name], |row| row.get(0))
    }

    /// The names of all groups.
    pub fn groups(&self) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT name FROM grp ORDER BY name", [], |row| row.get(0))
    }

    /// Makes a group, if there is none.
    pub fn put_group(&self, name: &str) -> Result<(), CatalogError> {
        self.execute("INSERT OR IGNORE INTO grp VALUES (?1, ?2)", rusqlite::params![name, now()])?;
        Ok(())
    }

    /// Forgets a group.
    pub fn remove_group(&self, name: &str) -> Result<(), CatalogError> {
        self.execute("DELETE FROM grp WHERE name = ?1", [name])?;
        Ok(())
    }

    /// A group's members.
    pub fn members(&self, group: &str) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT member FROM member WHERE grp = ?1 ORDER BY member", [group], |row| row.get(0))
    }

    /// The VMs of a group.
    pub fn vms_in(&self, group: &str) -> Result<Vec<String>, CatalogError> {
        self.all(
            "SELECT substr(member, 4) FROM member WHERE grp = ?1 AND member LIKE 'vm:%' ORDER BY member",
            [group],
            |row| row.get(0),
        )
    }

    /// The groups of a member.
    pub fn groups_of(&self, member: &str) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT grp FROM member WHERE member = ?1 ORDER BY grp", [member], |row| row.get(0))
    }

    /// Adds a member; whether it was none.
    pub fn add_member(&self, group: &str, member: &str) -> Result<bool, CatalogError> {
        Ok(self.execute("INSERT OR IGNORE INTO member VALUES (?1, ?2)", [group, member])? > 0)
    }

    /// Takes a member away; whether it was one.
    pub fn remove_member(&self, group: &str, member: &str) -> Result<bool, CatalogError> {
        Ok(self.execute("DELETE FROM member WHERE grp = ?1 AND member = ?2", [group, member])? > 0)
    }

    /// What a group's principals may do.
    pub fn grants(&self, group: &str) -> Result<Vec<Grant>, CatalogError> {
        self.all("SELECT verb, pattern FROM permission WHERE grp = ?1 ORDER BY pattern, verb", [group], |row| {
            Ok(Grant { verb: row.get(0)?, on: row.get(1)? })
        })
    }

    /// What a principal may do, by all its groups.
    pub fn grants_of(&self, principal: &str) -> Result<Vec<Grant>, CatalogError> {
        self.all(
            "SELECT DISTINCT verb, pattern FROM permission JOIN member USING (grp) WHERE member = ?1",
            [principal],
            |row| Ok(Grant { verb: row.get(0)?, on: row.get(1)? }),
        )
    }

    /// Lets a group's principals do something.
    pub fn add_grant(&self, group: &str, grant: &Grant) -> Result<(), CatalogError> {
        self.execute(
            "INSERT OR IGNORE INTO permission VALUES (?1, ?2, ?3)",
            rusqlite::params![group, grant.verb, grant.on],
        )?;
        Ok(())
    }

    /// No longer lets a group's principals do something; whether they could.
    pub fn remove_grant(&self, group: &str, grant: &Grant) -> Result<bool, CatalogError> {
        let removed = self.execute(
            "DELETE FROM permission WHERE grp = ?1 AND verb = ?2 AND pattern = ?3",
            rusqlite::params![group, grant.verb, grant.on],
        )?;
        Ok(removed > 0)
    }
}
