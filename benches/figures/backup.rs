//! A VM that is backed up while its guest writes: how long the guest stands for it, how long the first backup takes and the next
//! one, and how long until the VM that is made from it runs.
//!
//! The guest writes 4 KiB after 4 KiB past its page cache to one disk, seen as in `mirrored`; its other disk holds 512 MiB that
//! cannot be compressed.

use crate::{
    mirrored::{replica, stands},
    sample::Sample,
};
use anyhow::{Result, ensure};
use haven_lab::drive::Driver;
use std::time::{Duration, Instant};

/// What the second disk holds, bytes.
const LOAD: u64 = 512 << 20;

fn prepare(lab: &Driver) -> Result<()> {
    lab.haven(&["lab", "exec", "host1", "--", "mkdir", "-p", "/srv/shared/backups"])?;
    lab.haven(&["backup", "target", "create", "nas", "--directory", "/srv/shared/backups"])?;
    let bulk = lab.dir.join("bulk.raw");
    let mut noise = std::io::Read::take(std::fs::File::open("/dev/urandom")?, LOAD);
    std::io::copy(&mut noise, &mut std::fs::File::create(&bulk)?)?;
    lab.haven(&["image", "import", "bulk", &bulk.display().to_string()])?;
    std::fs::remove_file(&bulk)?;
    let writes = "#!/bin/sh\nwhile :; do dd if=/dev/zero of=/dev/vda bs=4k count=4096 oflag=direct conv=notrunc 2> /dev/null; done\n";
    let manifest = format!(
        "kind: Pool\nname: mirrored\ndriver: mirrored\npath: /var/lib/haven/mirrored\n---\nkind: VM\nname: writer\nimage: tiny\nmemory: 128MiB\ndisks:\n- {{name: data, size: 64MiB, pool: mirrored}}\n- {{name: bulk, size: 512MiB, pool: mirrored, image: bulk}}\nuserData: {writes:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "180"])?;
    std::thread::sleep(Duration::from_secs(8));
    Ok(())
}

/// Backs it up: how long that takes, and the longest time in which the guest writes nothing meanwhile.
fn back_up(lab: &Driver) -> Result<(f64, f64)> {
    let file = replica(lab, &lab.host_of("writer")?, "writer.data")?;
    let watch = std::thread::spawn(move || stands(&file, Duration::from_secs(8)));
    std::thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    let said = lab.haven(&["backup", "run", "writer"])?;
    let took = begin.elapsed().as_secs_f64();
    println!("  {}", said.trim());
    let stood = watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??;
    ensure!(took < 7.0, "it took {took:.1} s, longer than the watch");
    Ok((took, stood))
}

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    prepare(lab)?;
    let (mut whole, mut next, mut made) = (Sample::default(), Sample::default(), Sample::default());
    let (mut calm, mut stood, mut stood_next) =
        (Sample::default(), Sample::default(), Sample::default());
    for run in 0..runs {
        let file = replica(lab, &lab.host_of("writer")?, "writer.data")?;
        calm.push(stands(&file, Duration::from_secs(4))?);
        let place = format!("/srv/shared/backups-{run}");
        let target = format!("nas-{run}");
        // One that holds nothing yet.
        lab.haven(&["lab", "exec", "host1", "--", "mkdir", "-p", &place])?;
        lab.haven(&["backup", "target", "create", &target, "--directory", &place])?;
        let to = format!("backup: {{to: {target}, every: 100d}}\n");
        let object = lab.haven(&["get", "vm/writer", "-o", "yaml"])?;
        let mut within = false;
        let without = object.lines().filter(|line| {
            within = line.starts_with("backup:") || within && line.starts_with(' ');
            !within
        });
        let object: String = without.map(|line| format!("{line}\n")).collect();
        let watch = std::thread::spawn({
            let file = file.clone();
            move || stands(&file, Duration::from_secs(8))
        });
        std::thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        lab.apply(&format!("{object}\n{to}"), &[])?;
        lab.wait("it is backed up by its schedule", Duration::from_secs(60), |lab| {
            let run = lab.ask(|client| async move { client.backup("writer").await });
            let run = run.ok().and_then(|view| view.run);
            run.is_some_and(|run| {
                run.to.as_str() == target && run.outcome.is_some_and(|end| end.well)
            })
        })?;
        whole.push(begin.elapsed().as_secs_f64());
        stood.push(watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??);
        let (took, stands) = back_up(lab)?;
        next.push(took);
        stood_next.push(stands);
        let begin = Instant::now();
        let args = ["backup", "restore", "writer", "--in", &target, "--as", "again"];
        lab.haven(&[&args[..], &["--timeout", "120"]].concat())?;
        made.push(begin.elapsed().as_secs_f64());
        lab.haven(&["vm", "rm", "again", "--wait"])?;
    }
    let none = f64::INFINITY;
    calm.print("longest pause between two changes, nothing happens", none, none);
    stood.print("the same while all of it is backed up", none, none);
    stood_next.print("the same while what changed is backed up", none, none);
    whole.print("all of it, 512 MiB, from the wish to the backup", none, none);
    next.print("what changed, from the command to its end", none, none);
    made.print("a VM made from it runs", none, none);
    Ok(())
}
