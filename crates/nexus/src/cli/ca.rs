//! `nexus ca`: regions' certificate authorities, made by the root whose key is kept offline.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_iam::CertificateAuthority;
use nexus_model::Name;

use super::{join, output};
use crate::config::REGION_AUTHORITY_LIFE;
use crate::exit::Fail;
use crate::local::materials::keep_authority;
use crate::secret_file;

/// Makes regions' certificate authorities by the root's key, on a machine that needs no network
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus ca region west --root ca.pem --root-key root.key --out new\n\n\
    Run it where the root's key is kept. Put both files where `[authority]` in the nexus.toml of the region's servers says, and restart these one after another. \
    Certificates that the former authority signed stay good until they end.")]
pub struct CaArgs {
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Makes an authority for a region, for two years: a new region's, or one in place of one that ends
    Region {
        region: Name,
        /// The root's certificate
        #[arg(long, value_name = "FILE")]
        root: PathBuf,
        /// The root's key
        #[arg(long, value_name = "FILE")]
        root_key: PathBuf,
        /// The folder for `REGION.pem` and `REGION.key`
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
    },
}

pub fn run(args: &CaArgs) -> anyhow::Result<()> {
    let CaCommand::Region { region, root, root_key, out } = &args.command;
    let cert = std::fs::read_to_string(root).with_context(|| format!("reading {}", root.display()))?;
    let ca = CertificateAuthority::from_pem(&cert, &secret_file::read_text(root_key)?)
        .with_context(|| format!("the root {}", root.display()))?;
    let made = ca.intermediate(region.as_str(), join::now(), REGION_AUTHORITY_LIFE)?;
    let file = |end: &str| out.join(format!("{region}.{end}"));
    let (cert, key) = (file("pem"), file("key"));
    for path in [&cert, &key] {
        if path.exists() {
            return Err(Fail::conflict(format!("{} is there already: move it away first", path.display())).into());
        }
    }
    keep_authority(&made, &cert, &key)?;
    output::text(&format!("{}\n{}", cert.display(), key.display()))
}
