//! `nexus rebalance`: shows what would be moved, and moves it when told so.

use clap::Args;
use nexus_api::operations::{Rebalance, Rebalanced};

use super::cloud::{Cloud, CloudArgs};
use super::output::{self, Format};
use super::{join, table};

/// Moves instances to where they would be placed today; without --yes, only shows which
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus rebalance\n  \
    nexus rebalance --max 5 --yes\n\n\
    An instance is moved when its app's constraints are met elsewhere and not here, when its app is spread more evenly by it,\n\
    or from an overburdened host. Each goes when another is ready in its place. Nothing is ever moved without this command.")]
pub struct RebalanceArgs {
    /// At most so many moves
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=50))]
    max: u32,
    /// Carries the plan out
    #[arg(long)]
    yes: bool,
    /// Only shows the plan (the default)
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &RebalanceArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let body = Rebalance { region: args.cloud.region.clone(), max: args.max, dry_run: args.dry_run || !args.yes };
    let done: Rebalanced = join::run(&cloud, "rebalance", &body).await?;
    match args.output {
        Format::Json => return output::json(&done),
        Format::Yaml => return output::yaml(&done),
        _ => {}
    }
    if done.moves.is_empty() {
        return output::text("nothing would stand better elsewhere");
    }
    let row = |m: &nexus_api::operations::Relocation| {
        let instance = format!("{}/{}", m.project, m.instance);
        [instance, m.from.to_string(), m.to.to_string(), m.why.clone()].map(|text| output::plain(&text)).to_vec()
    };
    let rows = done.moves.iter().map(row).collect();
    output::text(&table::Printer::new(&["INSTANCE", "FROM", "TO", "WHY"]).lines(rows))?;
    let n = done.moves.len();
    if done.begun {
        output::text(&format!("{n} instances move, each when another is ready in its place"))
    } else {
        output::note(&format!("{n} moves; nothing was moved: `nexus rebalance --max {} --yes` does it", args.max));
        Ok(())
    }
}
