//! `haven image …`.

use super::{Removal, list, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Args, Subcommand};
use futures::TryStreamExt;
use haven_client::{ClientError, encode};
use haven_model::{Object, object::Kind};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt};

/// How long a web server has to take a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// What an image is made of.
#[derive(Debug, Args)]
pub struct NewImage {
    /// Its name
    name: String,
    /// The disk, a file or an http(s) address: qcow2, raw, vmdk, vhdx
    disk: Option<Source>,
    /// SHA-256 that the disk must have; nothing is kept that has another
    #[arg(long)]
    checksum: Option<String>,
    /// A kernel to boot directly, a file or an address
    #[arg(long)]
    kernel: Option<Source>,
    /// Its initial file system, a file or an address
    #[arg(long)]
    initrd: Option<Source>,
    /// Its command line
    #[arg(long)]
    cmdline: Option<String>,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Import an image from files or web addresses
    #[command(
        after_help = "Examples:\n  haven image import debian debian-13.qcow2 --checksum SHA256\n  haven image import debian https://mirror.example/debian-13.qcow2 --checksum SHA256\n  haven image import tiny --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0 quiet'"
    )]
    Import(Box<NewImage>),
    /// List images
    #[command(after_help = "Examples:\n  haven image ls\n  haven image ls -o wide")]
    Ls(How),
    /// Show an image and what there is to say of it
    #[command(
        after_help = "Examples:\n  haven image show debian\n  haven image show debian -o json"
    )]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Remove an image; it goes once no VM uses it
    #[command(after_help = "Examples:\n  haven image rm debian --wait")]
    Rm(Removal),
}

/// A SHA-256 as people write it: in either case, perhaps behind `sha256:`.
fn checksum(text: &str) -> Result<String, Failure> {
    let lower = text.trim().to_ascii_lowercase();
    let plain = lower.strip_prefix("sha256:").unwrap_or(&lower);
    if plain.len() == 64 && plain.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(plain.to_owned());
    }
    Err(Failure::bad(
        format!("`{text}` is not a SHA-256: it has 64 hexadecimal digits"),
        "`sha256sum FILE` prints one; the image's publisher names the right one",
    ))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::bad(format!("{} cannot be read: {error}", path.display()), "check the path")
}

async fn open(path: &Path) -> Result<tokio::fs::File, Failure> {
    tokio::fs::File::open(path).await.map_err(|error| unreadable(path, &error))
}

/// Where a part of an image comes from.
#[derive(Clone, Debug)]
enum Source {
    File(PathBuf),
    Web(reqwest::Url),
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            None => Ok(Self::File(text.into())),
            Some(("http" | "https", _)) => {
                let url = text.parse().map_err(|error| format!("this is no address: {error}"))?;
                Ok(Self::Web(url))
            }
            Some((scheme, _)) => Err(format!("`{scheme}` is not http or https; fetch it yourself")),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Web(url) => write!(f, "{url}"),
        }
    }
}

impl Source {
    /// Its bytes, and how many there are if that is known.
    async fn open(&self) -> Result<(Box<dyn AsyncRead + Send + Unpin>, Option<u64>), Failure> {
        let url = match self {
            Self::File(path) => {
                let file = open(path).await?;
                let length = file.metadata().await.map_err(|error| unreadable(path, &error))?.len();
                return Ok((Box::new(file), Some(length)));
            }
            Self::Web(url) => url,
        };
        let failed = |error: reqwest::Error| {
            let why = haven_host::agent::chain(&error.without_url());
            Failure::bad(
                format!("{url} cannot be fetched: {why}"),
                "check the address; `curl -LI ADDRESS` shows what its server says",
            )
        };
        let client = reqwest::Client::builder().connect_timeout(CONNECT).read_timeout(SILENCE);
        let answer = client.build().map_err(failed)?.get(url.clone()).send().await;
        let answer = answer.and_then(reqwest::Response::error_for_status).map_err(failed)?;
        let length = answer.content_length();
        let bytes = answer
            .bytes_stream()
            .map_err(|error| std::io::Error::other(innermost(&error.without_url())));
        Ok((Box::new(tokio_util::io::StreamReader::new(Box::pin(bytes))), length))
    }
}

/// The error that caused all others, in words.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// What moves, for people at a terminal.
fn bar(what: &str, length: Option<u64>) -> ProgressBar {
    let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    let template = match length {
        Some(_) => "  {msg} [{bar:24}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
        None => "  {msg} {bytes}, {bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}

/// Reads the file and compares its sum.
async fn verify(path: &Path, expected: &str) -> Result<(), Failure> {
    let (mut file, mut sum, mut buffer) = (open(path).await?, Sha256::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) => sum.update(&buffer[..n]),
            Err(error) => return Err(unreadable(path, &error)),
        }
    }
    let found: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found == expected {
        return Ok(());
    }
    Err(Failure::bad(
        format!(
            "the checksum of {} is not the one given; nothing was imported\n  expected {expected}\n  found    {found}",
            path.display()
        ),
        "the file is damaged or another one: get it again",
    ))
}

async fn import(image: NewImage) -> Result<(), Failure> {
    let name = reference(Kind::Image, &image.name)?.name;
    let expected = image.checksum.as_deref().map(checksum).transpose()?;
    if let (Some(sum), disk) = (&expected, &image.disk) {
        let none = || {
            Failure::bad(
                "--checksum is for a disk, and none is given",
                "name the disk, or leave it out",
            )
        };
        // What comes from elsewhere is compared by the cluster, as it comes.
        if let Source::File(path) = disk.as_ref().ok_or_else(none)? {
            verify(path, sum).await?;
        }
    }
    let parts: Vec<(&str, Source)> =
        [("disk", image.disk), ("kernel", image.kernel), ("initrd", image.initrd)]
            .into_iter()
            .filter_map(|(part, file)| Some((part, file?)))
            .collect();
    if parts.is_empty() {
        let hint = "name a file or an address, or give --kernel";
        return Err(Failure::bad("an image needs a disk or a kernel", hint));
    }
    // All files are there before the first is sent.
    for (_, source) in &parts {
        if let Source::File(path) = source {
            open(path).await?;
        }
    }
    let client = connect().await?;
    for (part, source) in parts {
        let mut query: Vec<String> =
            image.cmdline.iter().map(|line| format!("cmdline={}", encode(line))).collect();
        let sum = expected.as_ref().filter(|_| part == "disk");
        query.extend(sum.map(|sum| format!("checksum={sum}")));
        let (bytes, length) = source.open().await?;
        let bar = bar(part, length);
        let moved = bar.wrap_async_read(bytes);
        let sent = client.import(name.as_str(), part, &query.join("&"), moved).await;
        bar.finish_and_clear();
        let item = sent.map_err(|error| match error {
            ClientError::Source(why) => Failure::failed(
                format!("{source} broke off: {why}; nothing was imported"),
                "try again",
            ),
            other => other.into(),
        })?;
        let kept = match &item.object {
            Object::Image(image) => image.spec.disk.as_ref().map(|file| file.sha256.clone()),
            _ => None,
        };
        if let (Some(sum), Some(kept)) = (sum, kept)
            && *sum != kept
        {
            return Err(Failure::failed(
                format!("the cluster holds a disk with the checksum {kept}, not {sum}"),
                format!("remove it with `haven image rm {name}` and import it again"),
            ));
        }
        out::line(format_args!("{part} of image {name} imported, {}", item.state));
    }
    Ok(())
}

/// Runs it.
pub async fn run(command: ImageCommand) -> Result<(), Failure> {
    match command {
        ImageCommand::Import(image) => import(*image).await,
        ImageCommand::Ls(how) => list(Kind::Image, how.output).await,
        ImageCommand::Show { name, how } => show(&reference(Kind::Image, &name)?, how.output).await,
        ImageCommand::Rm(removal) => remove(Kind::Image, &removal).await,
    }
}

#[cfg(test)]
mod tests {
    use super::{checksum, verify};

    const SUM: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn sums_are_read_in_every_way_people_write_them() {
        assert_eq!(checksum(&format!("SHA256:{}", SUM.to_uppercase())).unwrap(), SUM);
        assert!(checksum("d41d8cd98f00b204e9800998ecf8427e").is_err());
    }

    #[tokio::test]
    async fn a_wrong_sum_names_both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, "abc").unwrap();
        verify(&path, SUM).await.unwrap();
        let said = verify(&path, &"0".repeat(64)).await.unwrap_err();
        assert_eq!(said.code, 2);
        let text = said.to_string().replace(&directory.path().display().to_string(), "DIR");
        insta::assert_snapshot!(text);
    }
}
