//! `pando upgrade`: backends go on with the program that is installed now.

use anyhow::bail;

use crate::daemon::api::types::Upgraded;

use super::Outcome;
use super::asking::Asking;
use super::table::table;

/// Have every running backend go on with the pando-blk that is installed now; guests notice a pause of milliseconds
///
/// 'systemctl restart pando' upgrades the daemon alone. A backend whose new program cannot take over goes on with the old one.
#[derive(clap::Args)]
pub struct Upgrade {
    #[command(flatten)]
    asking: Asking,
}

impl Upgrade {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let answer: serde_json::Value = self.asking.client()?.post("/v1/upgrade", None)?;
        let upgraded: Vec<Upgraded> = serde_json::from_value(answer.clone())?;
        self.asking.show(answer, text)?;
        match upgraded.iter().filter(|upgraded| upgraded.error.is_some()).count() {
            0 => Ok(Outcome::Done),
            failed => bail!("{failed} of {} backends go on with the program that they had", upgraded.len()),
        }
    }
}

fn text(upgraded: Vec<Upgraded>) -> String {
    let row =
        |upgraded: Upgraded| [upgraded.vm, upgraded.volume, upgraded.error.unwrap_or_else(|| "upgraded".to_owned())];
    table(["VM", "VOLUME", "RESULT"], upgraded.into_iter().map(row), "no backend runs")
}
