//! `pando deploy` and `pando deployment`: one image for a whole group of VMs.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::daemon::api::types::{Channel, DeployState, DeployTarget, Deployment as DeploymentAnswer};

use super::Outcome;
use super::asking::Asking;
use super::client::{Client, Refused, part};
use super::output::note;
use super::table::{ago, image, image_or_dash, table};

/// Give an image to the VMs of a group, at the next boot or start of each
///
/// Persistent 'cow' volumes get it when they are rebuilt. Add-ons and private disks are left alone.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pando deploy debian-12.8 --group canary
  pando deploy debian-12/stable --group web --wait
  pando deploy --rollback 3")]
pub struct Deploy {
    #[command(flatten)]
    asking: Asking,
    /// An image (a version, a digest, or its first 8 digits or more), or a channel, whose present image is meant
    #[arg(required_unless_present_any = ["abort", "rollback"], conflicts_with_all = ["abort", "rollback"])]
    what: Option<String>,
    /// The group whose VMs get it
    #[arg(long, required_unless_present_any = ["abort", "rollback"])]
    group: Option<String>,
    /// Take a deployment back where it has not arrived yet
    #[arg(long, value_name = "ID", conflicts_with = "rollback")]
    abort: Option<i64>,
    /// Take a deployment back everywhere: VMs that run its image have the previous one at their next boot
    #[arg(long, value_name = "ID")]
    rollback: Option<i64>,
    /// Wait until every VM has it, or it is known that it will not
    #[arg(long)]
    wait: bool,
    /// How many seconds to wait at most
    #[arg(long, default_value_t = 3600, requires = "wait")]
    timeout: u64,
}

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Deployment {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// List deployments, the newest first
    List,
    /// Show how far each VM of a deployment is
    Show {
        /// The deployment
        id: i64,
    },
}

impl Deploy {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        let answer: Value = match (self.abort, self.rollback, &self.what) {
            (Some(id), ..) => client.post(&format!("/v1/deployments/{id}/abort"), None)?,
            (_, Some(id), _) => client.post(&format!("/v1/deployments/{id}/rollback"), None)?,
            (.., Some(what)) => {
                let kind = if is_channel(&client, what)? { "channel" } else { "image" };
                client.post("/v1/deployments", Some(json!({ kind: what, "group": self.group })))?
            }
            _ => bail!("say what to deploy"),
        };
        let answer = if self.wait { wait(&client, answer, Duration::from_secs(self.timeout))? } else { answer };
        self.asking.show(answer, show_text)?;
        Ok(Outcome::Done)
    }
}

fn is_channel(client: &Client, name: &str) -> anyhow::Result<bool> {
    match client.get::<Channel>(&format!("/v1/channels/{}", part(name))) {
        Ok(_) => Ok(true),
        Err(error) if error.downcast_ref::<Refused>().is_some() => Ok(false),
        Err(error) => Err(error),
    }
}

fn read(answer: &Value) -> anyhow::Result<DeploymentAnswer> {
    serde_json::from_value(answer.clone()).context("the daemon's answer cannot be read: it may be of another version")
}

fn wait(client: &Client, mut answer: Value, patience: Duration) -> anyhow::Result<Value> {
    const LOOKS_EVERY: Duration = Duration::from_millis(500);
    let begun = Instant::now();
    let mut said = None;
    loop {
        let deployment = read(&answer)?;
        let staged = deployment.targets.iter().filter(|target| target.state == DeployState::Staged).count();
        if staged == 0 {
            return Ok(answer);
        }
        if said != Some(staged) {
            let all = deployment.targets.len();
            note(format_args!("{} of {all} volumes have it; {staged} get it at their VMs' next boot", all - staged));
            said = Some(staged);
        }
        if begun.elapsed() > patience {
            bail!(
                "{staged} volumes do not have it after {} s: 'pando deployment show {}' says which",
                patience.as_secs(),
                deployment.id
            );
        }
        std::thread::sleep(LOOKS_EVERY);
        answer = client.get(&format!("/v1/deployments/{}", deployment.id))?;
    }
}

impl Deployment {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        match self.verb {
            Verb::List => self.asking.show(client.get("/v1/deployments")?, list_text)?,
            Verb::Show { id } => self.asking.show(client.get(&format!("/v1/deployments/{id}"))?, show_text)?,
        }
        Ok(Outcome::Done)
    }
}

fn state_words(target: &DeployTarget) -> String {
    match target.state {
        DeployState::Staged => "staged, active at next boot".to_owned(),
        DeployState::Active => "active".to_owned(),
        DeployState::NeedsRebuild => "needs 'pando volume rebuild'".to_owned(),
        DeployState::Failed => format!("failed: {}", target.error.as_deref().unwrap_or("no reason is known")),
        DeployState::Superseded => "superseded".to_owned(),
        DeployState::Aborted => "aborted".to_owned(),
        DeployState::Removed => "removed".to_owned(),
    }
}

fn list_text(deployments: Vec<DeploymentAnswer>) -> String {
    let row = |deployment: DeploymentAnswer| {
        let count = |state| deployment.targets.iter().filter(|target| target.state == state).count().to_string();
        [
            deployment.id.to_string(),
            image(&deployment.image),
            deployment.group.clone(),
            deployment.state.clone(),
            count(DeployState::Staged),
            count(DeployState::Active),
            count(DeployState::NeedsRebuild),
            count(DeployState::Failed),
            ago(deployment.at),
            deployment.by.clone(),
        ]
    };
    let headings = ["ID", "IMAGE", "GROUP", "STATE", "STAGED", "ACTIVE", "TO REBUILD", "FAILED", "WHEN", "BY"];
    table(headings, deployments.into_iter().map(row), "nothing has been deployed; 'pando deploy' does that")
}

fn show_text(deployment: DeploymentAnswer) -> String {
    let row = |target: DeployTarget| {
        let state = state_words(&target);
        [target.vm, target.volume, state, image_or_dash(&target.previous)]
    };
    let head = format!(
        "deployment {}: {} to group {}, {}\n",
        deployment.id,
        image(&deployment.image),
        deployment.group,
        deployment.state
    );
    head + &table(["VM", "VOLUME", "STATE", "PREVIOUS"], deployment.targets.into_iter().map(row), "no volumes")
}
