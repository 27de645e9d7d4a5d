//! `haven image …`.

use crate::{
    connect::connect,
    failure::Failure,
    render::{self, Output},
};
use clap::Subcommand;
use haven_model::{ObjectRef, object::Kind};
use std::path::{Path, PathBuf};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Import an image from files
    #[command(
        after_help = "Examples:\n  haven image import debian debian-13.qcow2 --checksum SHA256\n  haven image import tiny --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0 quiet'"
    )]
    Import {
        /// Its name
        name: String,
        /// The disk: qcow2, raw, vmdk, vhdx
        disk: Option<PathBuf>,
        /// SHA-256 that the disk must have
        #[arg(long)]
        checksum: Option<String>,
        /// A kernel to boot directly
        #[arg(long)]
        kernel: Option<PathBuf>,
        /// Its initial file system
        #[arg(long)]
        initrd: Option<PathBuf>,
        /// Its command line
        #[arg(long)]
        cmdline: Option<String>,
    },
    /// List images
    #[command(after_help = "Examples:\n  haven image ls")]
    Ls {
        /// How
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Remove an image
    #[command(after_help = "Examples:\n  haven image rm debian")]
    Rm { name: String },
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-_.".contains(&b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

async fn open(path: &Path) -> Result<tokio::fs::File, Failure> {
    let opened = tokio::fs::File::open(path).await;
    opened.map_err(|e| {
        Failure::bad(format!("{} cannot be read: {e}", path.display()), "check the path")
    })
}

/// Runs it.
pub async fn run(command: ImageCommand) -> Result<(), Failure> {
    match command {
        ImageCommand::Import { name, disk, checksum, kernel, initrd, cmdline } => {
            let parts: Vec<(&str, PathBuf)> =
                [("disk", disk), ("kernel", kernel), ("initrd", initrd)]
                    .into_iter()
                    .filter_map(|(p, f)| Some((p, f?)))
                    .collect();
            if parts.is_empty() {
                return Err(Failure::bad(
                    "an image needs a disk or a kernel",
                    "name a FILE, or give --kernel",
                ));
            }
            let client = connect().await?;
            for (part, path) in parts {
                let mut query =
                    cmdline.as_ref().map(|c| format!("cmdline={}", encode(c))).unwrap_or_default();
                if let (Some(sum), "disk") = (&checksum, part) {
                    query.push_str(&format!("&checksum={}", sum.trim_start_matches("sha256:")));
                }
                let item = client.import(&name, part, &query, open(&path).await?).await?;
                println!("{part} of image {name} imported, {}", item.state);
            }
        }
        ImageCommand::Ls { output } => {
            print!("{}", render::items(&connect().await?.list(Kind::Image).await?, output))
        }
        ImageCommand::Rm { name } => {
            let what: ObjectRef = format!("image/{name}")
                .parse()
                .map_err(|e: haven_model::ModelError| Failure::bad(e.to_string(), ""))?;
            println!("{}", connect().await?.delete(&what).await?.state);
        }
    }
    Ok(())
}
