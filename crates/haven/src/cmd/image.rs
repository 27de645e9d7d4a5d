//! `haven image …`.

use super::{Removal, list, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Args, Subcommand};
use haven_client::encode;
use haven_model::{Object, object::Kind};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tokio::io::AsyncReadExt;

/// What an image is made of.
#[derive(Debug, Args)]
pub struct NewImage {
    /// Its name
    name: String,
    /// The disk: qcow2, raw, vmdk, vhdx
    disk: Option<PathBuf>,
    /// SHA-256 that the disk must have; checked before anything is sent
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
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Import an image from files
    #[command(
        after_help = "Examples:\n  haven image import debian debian-13.qcow2 --checksum SHA256\n  haven image import tiny --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0 quiet'"
    )]
    Import(NewImage),
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
        verify(disk.as_deref().ok_or_else(none)?, sum).await?;
    }
    let parts: Vec<(&str, PathBuf)> =
        [("disk", image.disk), ("kernel", image.kernel), ("initrd", image.initrd)]
            .into_iter()
            .filter_map(|(part, file)| Some((part, file?)))
            .collect();
    if parts.is_empty() {
        let hint = "name a FILE, or give --kernel";
        return Err(Failure::bad("an image needs a disk or a kernel", hint));
    }
    // All files are there before the first is sent.
    for (_, path) in &parts {
        open(path).await?;
    }
    let client = connect().await?;
    for (part, path) in parts {
        let mut query: Vec<String> =
            image.cmdline.iter().map(|line| format!("cmdline={}", encode(line))).collect();
        let sum = expected.as_ref().filter(|_| part == "disk");
        query.extend(sum.map(|sum| format!("checksum={sum}")));
        let item = client.import(name.as_str(), part, &query.join("&"), open(&path).await?).await?;
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
        ImageCommand::Import(image) => import(image).await,
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
