//! `haven certificate …`.

use super::{Removal, list, new, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Args, Subcommand};
use haven_client::ClientError;
use haven_model::{
    CertificateSpec, Object,
    api::ManifestFile,
    manifest::{LARGEST, to_yaml},
    object::Kind,
};
use std::path::{Path, PathBuf};

/// What a certificate is made of.
#[derive(Debug, Args)]
pub struct NewCertificate {
    /// Its name
    name: String,
    /// The certificate and those that lead to its authority, PEM, its own first
    #[arg(long, value_name = "FILE")]
    chain: PathBuf,
    /// Its private key, PEM, without a passphrase; the cluster keeps it sealed
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum CertificateCommand {
    /// List certificates, with when they end and who uses them
    #[command(after_help = "Examples:\n  haven certificate ls\n  haven certificate ls -o wide")]
    Ls(How),
    /// Show a certificate and what there is to say of it; its key is never shown
    #[command(
        after_help = "Examples:\n  haven certificate show shop\n  haven certificate show shop -o yaml"
    )]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Add a certificate, or replace one that is there: services take it up without dropping a connection
    #[command(
        after_help = "Examples:\n  haven certificate add shop --chain fullchain.pem --key privkey.pem\n  haven certificate add shop --chain /etc/letsencrypt/live/shop.example/fullchain.pem --key /etc/letsencrypt/live/shop.example/privkey.pem"
    )]
    Add(NewCertificate),
    /// Delete a certificate; it goes once no service uses it
    #[command(after_help = "Examples:\n  haven certificate rm shop --wait")]
    Rm(Removal),
}

/// Reads a file of PEM.
fn read(path: &Path) -> Result<String, Failure> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        Failure::bad(format!("{shown} cannot be read: {error}"), "check the path and its owner")
    };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > LARGEST as u64 / 4 {
        return Err(Failure::bad(
            format!("{shown} is {size} bytes long, far more than a certificate"),
            "name a file that holds PEM",
        ));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

async fn add(given: NewCertificate) -> Result<(), Failure> {
    let spec = CertificateSpec { chain: read(&given.chain)?, key: read(&given.key)? };
    let mut object = Object::Certificate(new(&given.name, spec)?);
    let (what, client) = (object.reference(), connect().await?);
    match client.object(&what).await {
        Ok(there) => object.meta_mut().labels.clone_from(&there.object.meta().labels),
        Err(ClientError::Refused(body)) if body.status == 404 => {}
        Err(error) => return Err(error.into()),
    }
    // Places within this text are of no use to a person, who sees only the files.
    let file = ManifestFile { name: "request".into(), text: to_yaml(&object) };
    let applied = client.apply(vec![file], false).await?;
    let outcome = applied.first().map_or("unchanged", |one| one.outcome.as_str());
    out::line(format_args!("{what} {outcome}"));
    Ok(())
}

/// Runs it.
pub async fn run(command: CertificateCommand) -> Result<(), Failure> {
    match command {
        CertificateCommand::Ls(how) => list(Kind::Certificate, how.output).await,
        CertificateCommand::Show { name, how } => {
            show(&reference(Kind::Certificate, &name)?, how.output).await
        }
        CertificateCommand::Add(certificate) => add(certificate).await,
        CertificateCommand::Rm(removal) => remove(Kind::Certificate, &removal).await,
    }
}
