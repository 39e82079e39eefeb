//! `pando group`: who may do what, and which VMs are deployed to together.

use serde_json::{Value, json};

use crate::daemon::api::types::Group as GroupAnswer;

use super::Outcome;
use super::asking::Asking;
use super::client::{part, query};
use super::table::{ago, fields, list, table};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Group {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Create a group
    Create {
        /// The group
        name: String,
    },
    /// List groups
    List,
    /// Show a group's members and grants
    Show {
        /// The group
        name: String,
    },
    /// Remove a group
    Rm {
        /// The group
        name: String,
    },
    /// Add members
    Add {
        /// The group
        name: String,
        /// uid:NUMBER, gid:NUMBER or vm:NAME
        #[arg(required = true)]
        members: Vec<String>,
    },
    /// Take members out
    Remove {
        /// The group
        name: String,
        /// uid:NUMBER, gid:NUMBER or vm:NAME
        #[arg(required = true)]
        members: Vec<String>,
    },
    /// Let a group's users do something
    #[command(after_help = "\
Examples:
  pando group grant web use volume:os
  pando group grant web write 'volume:web-*'
  pando group grant release publish 'image:*'")]
    Grant(Grant),
    /// No longer let a group's users do something
    Revoke(Grant),
}

#[derive(clap::Args)]
struct Grant {
    /// The group
    name: String,
    /// use (see it, attach it read-only), write, publish (import, move, deploy) or admin
    verb: String,
    /// image:NAME, channel:NAME or volume:NAME, or the beginning of names and '*'
    on: String,
}

impl Group {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let Group { asking, verb } = self;
        let client = asking.client()?;
        let at = |name: &str| format!("/v1/groups/{}", part(name));
        let shown: Value = match verb {
            Verb::Create { name } => client.put(&at(&name), None)?,
            Verb::List => {
                asking.show(client.get("/v1/groups")?, list_text)?;
                return Ok(Outcome::Done);
            }
            Verb::Show { name } => client.get(&at(&name))?,
            Verb::Rm { name } => {
                client.delete(&at(&name))?;
                return Ok(Outcome::Done);
            }
            Verb::Add { name, members } => {
                for member in members {
                    let _: Value = client.post(&(at(&name) + "/members"), Some(json!({ "member": member })))?;
                }
                client.get(&at(&name))?
            }
            Verb::Remove { name, members } => {
                for member in members {
                    client.delete(&format!("{}/members/{}", at(&name), part(&member)))?;
                }
                client.get(&at(&name))?
            }
            Verb::Grant(Grant { name, verb, on }) => {
                client.post(&(at(&name) + "/grants"), Some(json!({ "verb": verb, "on": on })))?
            }
            Verb::Revoke(Grant { name, verb, on }) => {
                client.delete(&format!("{}/grants{}", at(&name), query(&[("verb", Some(verb)), ("on", Some(on))])))?;
                client.get(&at(&name))?
            }
        };
        asking.show(shown, show_text)?;
        Ok(Outcome::Done)
    }
}

fn grants_of(group: &GroupAnswer) -> Vec<String> {
    let word = |grant: &crate::daemon::api::types::Grant| {
        format!("{} {}", format!("{:?}", grant.verb).to_lowercase(), grant.on)
    };
    group.grants.iter().map(word).collect()
}

fn list_text(groups: Vec<GroupAnswer>) -> String {
    let row = |group: GroupAnswer| [group.name.clone(), list(&group.members), grants_of(&group).join(", ")];
    table(
        ["GROUP", "MEMBERS", "GRANTS"],
        groups.into_iter().map(row),
        "there are no groups; 'pando group create' makes one",
    )
}

fn show_text(group: GroupAnswer) -> String {
    fields([
        ("group", group.name.clone()),
        ("members", list(&group.members)),
        ("grants", if group.grants.is_empty() { "-".to_owned() } else { grants_of(&group).join(", ") }),
        ("created", ago(group.created_at)),
    ])
}
