//! `haven vm …`.

use crate::{
    connect::connect,
    failure::Failure,
    render::{self, Output},
};
use clap::Subcommand;
use haven_model::{ObjectRef, api::ManifestFile, object::Kind};
use std::{os::fd::AsFd, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Make a VM
    #[command(
        after_help = "Examples:\n  haven vm create web-1 --image tiny --memory 128MiB --network front --wait"
    )]
    Create {
        /// Its name
        name: String,
        /// For example 2GiB
        #[arg(long)]
        memory: String,
        /// Virtual CPUs
        #[arg(long, default_value_t = 1)]
        cpus: u32,
        /// An image that boots directly
        #[arg(long)]
        image: Option<String>,
        /// A network; may be given several times
        #[arg(long)]
        network: Vec<String>,
        /// NAME:SIZE:POOL[:IMAGE]; may be given several times
        #[arg(long)]
        disk: Vec<String>,
        /// Wait until it runs
        #[arg(long)]
        wait: bool,
    },
    /// List VMs
    #[command(after_help = "Examples:\n  haven vm ls\n  haven vm ls -o json")]
    Ls {
        /// How
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show a VM and what there is to say of it
    #[command(after_help = "Examples:\n  haven vm show web-1")]
    Show { name: String },
    /// Start a VM
    #[command(after_help = "Examples:\n  haven vm start web-1")]
    Start { name: String },
    /// Shut a VM down
    #[command(after_help = "Examples:\n  haven vm stop web-1")]
    Stop { name: String },
    /// Press a VM's reset button
    #[command(after_help = "Examples:\n  haven vm reset web-1")]
    Reset { name: String },
    /// Delete a VM
    #[command(after_help = "Examples:\n  haven vm rm web-1")]
    Rm { name: String },
    /// Open a VM's console; Ctrl-] leaves it
    #[command(after_help = "Examples:\n  haven vm console web-1")]
    Console { name: String },
    /// What a VM's console said
    #[command(after_help = "Examples:\n  haven vm log web-1")]
    Log { name: String },
}

fn reference(name: &str) -> Result<ObjectRef, Failure> {
    format!("vm/{name}")
        .parse()
        .map_err(|e: haven_model::ModelError| Failure::bad(e.to_string(), ""))
}

/// Runs it.
pub async fn run(command: VmCommand) -> Result<(), Failure> {
    let client = connect().await?;
    match command {
        VmCommand::Create { name, memory, cpus, image, network, disk, wait } => {
            let mut text = format!("kind: VM\nname: {name}\nmemory: {memory}\ncpus: {cpus}\n");
            if let Some(image) = image {
                text.push_str(&format!("image: {image}\n"));
            }
            if !network.is_empty() {
                text.push_str("networks:\n");
                network.iter().for_each(|n| text.push_str(&format!("- network: {n}\n")));
            }
            if !disk.is_empty() {
                text.push_str("disks:\n");
            }
            for one in &disk {
                let parts: Vec<&str> = one.split(':').collect();
                let [name, size, pool, rest @ ..] = parts.as_slice() else {
                    return Err(Failure::bad(
                        format!("`{one}` is not a disk"),
                        "write NAME:SIZE:POOL[:IMAGE]",
                    ));
                };
                text.push_str(&format!("- name: {name}\n  size: {size}\n  pool: {pool}\n"));
                rest.first()
                    .into_iter()
                    .for_each(|image| text.push_str(&format!("  image: {image}\n")));
            }
            let applied = client
                .apply(vec![ManifestFile { name: "command line".into(), text }], false)
                .await?;
            println!("vm/{name} {}", applied[0].outcome);
            if wait {
                super::objects::wait_for(&client, &applied, Duration::from_secs(120)).await?;
            }
        }
        VmCommand::Ls { output } => {
            print!("{}", render::items(&client.list(Kind::Vm).await?, output))
        }
        VmCommand::Show { name } => {
            let what = reference(&name)?;
            print!("{}", render::items(&[client.object(&what).await?], Output::Wide));
            client.explain(&what).await?.iter().for_each(|line| println!("{line}"));
        }
        VmCommand::Start { name } => println!("{}", client.vm(&name, "start").await?.state),
        VmCommand::Stop { name } => println!("{}", client.vm(&name, "stop").await?.state),
        VmCommand::Reset { name } => println!("{}", client.vm(&name, "reset").await?.state),
        VmCommand::Rm { name } => println!("{}", client.delete(&reference(&name)?).await?.state),
        VmCommand::Console { name } => {
            console(client.upgrade(&format!("/v1/vms/{name}/console")).await?).await?
        }
        VmCommand::Log { name } => print!("{}", String::from_utf8_lossy(&client.log(&name).await?)),
    }
    Ok(())
}

/// Joins the terminal with a console until Ctrl-] or the end of either.
async fn console(stream: Box<dyn haven_client::Duplex>) -> Result<(), Failure> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    let saved = tcgetattr(stdin.as_fd()).ok();
    if let Some(saved) = &saved {
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        let _ = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw);
        eprint!("connected; Ctrl-] leaves\r\n");
    }
    let (mut from, mut to) = tokio::io::split(stream);
    let (mut input, mut output) = (tokio::io::stdin(), tokio::io::stdout());
    let (mut typed, mut said) = ([0; 1024], [0; 4096]);
    let mut listening = true;
    loop {
        tokio::select! {
            biased;
            read = from.read(&mut said) => match read {
                Ok(n) if n > 0 => {
                    let _ = output.write_all(&said[..n]).await;
                    let _ = output.flush().await;
                }
                _ => break,
            },
            read = input.read(&mut typed), if listening => match read {
                Ok(n) if n > 0 && !typed[..n].contains(&0x1d) => {
                    if to.write_all(&typed[..n]).await.is_err() {
                        break;
                    }
                }
                // The end of a pipe leaves time for the answer; a terminal leaves at once.
                Ok(0) if saved.is_none() => listening = false,
                _ => break,
            },
            () = tokio::time::sleep(Duration::from_secs(1)), if !listening => break,
        }
    }
    if let Some(saved) = &saved {
        let _ = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, saved);
    }
    // A thread may still sit in a read of the terminal; the process ends without it.
    std::process::exit(0)
}
