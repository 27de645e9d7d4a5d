//! The kernel's own counters, under `/proc`: CPU time and memory of processes, and pressure stall information.

use super::driver::{Meter, Stalled, Used};
use crate::vm::{driver::RunningVm, process::is_gone};
use std::{io, path::PathBuf, time::Duration};

/// The unit of CPU time in `/proc/<pid>/stat`: `USER_HZ`, part of the kernel's interface (proc_pid_stat(5)).
const TICK: Duration = Duration::from_millis(10);

/// Reads them.
pub struct ProcMeter {
    /// `/proc`, but for tests.
    pub proc: PathBuf,
    /// The size of a page, bytes.
    pub page: u64,
}

impl ProcMeter {
    /// Of this machine.
    #[must_use]
    pub fn new() -> Self {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
        let page = page.and_then(|page| u64::try_from(page).ok()).unwrap_or(4096);
        Self { proc: "/proc".into(), page }
    }

    fn pressure(&self, of: &str) -> Option<Duration> {
        let text = std::fs::read_to_string(self.proc.join("pressure").join(of)).ok()?;
        let some = text.lines().find(|line| line.starts_with("some "))?;
        let total = some.split_whitespace().find_map(|field| field.strip_prefix("total="))?;
        Some(Duration::from_micros(total.parse().ok()?))
    }
}

impl Default for ProcMeter {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter for ProcMeter {
    fn used(&self, vm: &RunningVm) -> io::Result<Option<Used>> {
        let of = self.proc.join(vm.pid.to_string());
        let read = |file: &str| match std::fs::read_to_string(of.join(file)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        };
        let (Some(stat), Some(statm)) = (read("stat")?, read("statm")?) else { return Ok(None) };
        let odd = || io::Error::from(io::ErrorKind::InvalidData);
        // The name may hold anything, so the fields are counted from behind its bracket: the state, then ten others.
        let (_, rest) = stat.rsplit_once(')').ok_or_else(odd)?;
        let mut fields = rest.split_whitespace().skip(11);
        let mut next = || fields.next().and_then(|field| field.parse::<u32>().ok());
        let (user, system) = next().zip(next()).ok_or_else(odd)?;
        let resident = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
        Ok(Some(Used {
            cpu: TICK.saturating_mul(user).saturating_add(TICK.saturating_mul(system)),
            memory: resident.ok_or_else(odd)? * self.page,
        }))
    }

    fn stalled(&self) -> Option<Stalled> {
        Some(Stalled { cpu: self.pressure("cpu")?, memory: self.pressure("memory")? })
    }
}

#[cfg(test)]
mod tests {
    use super::{Meter, ProcMeter, Stalled, Used};
    use crate::vm::driver::RunningVm;
    use std::time::{Duration, Instant};

    fn vm(pid: i32) -> RunningVm {
        RunningVm { vm: "db".into(), epoch: 1, pid }
    }

    #[test]
    fn the_kernels_counters_are_read() {
        let proc = tempfile::tempdir().unwrap();
        let meter = ProcMeter { proc: proc.path().into(), page: 4096 };
        assert_eq!(meter.used(&vm(7)).unwrap(), None);
        assert_eq!(meter.stalled(), None);
        std::fs::create_dir_all(proc.path().join("7")).unwrap();
        let stat = "7 (haven-a) b) S 1 7 7 0 -1 4194304 9 9 0 0 250 50 0 0 20 0 3 0 99 1 2";
        std::fs::write(proc.path().join("7/stat"), stat).unwrap();
        std::fs::write(proc.path().join("7/statm"), "9000 300 20 1 0 500 0\n").unwrap();
        let used = Used { cpu: Duration::from_secs(3), memory: 300 * 4096 };
        assert_eq!(meter.used(&vm(7)).unwrap(), Some(used));
        std::fs::write(proc.path().join("7/stat"), "7 (haven-a").unwrap();
        assert!(meter.used(&vm(7)).is_err());
        std::fs::create_dir_all(proc.path().join("pressure")).unwrap();
        let some = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n";
        for of in ["cpu", "memory"] {
            let text = format!("{some}full avg10=0.00 avg60=0.00 avg300=0.00 total=9\n");
            std::fs::write(proc.path().join("pressure").join(of), text).unwrap();
        }
        let both = Duration::from_millis(1500);
        assert_eq!(meter.stalled(), Some(Stalled { cpu: both, memory: both }));
    }

    #[test]
    fn this_process_is_seen_to_work() {
        let (meter, me) = (ProcMeter::new(), vm(i32::try_from(std::process::id()).unwrap()));
        let before = meter.used(&me).unwrap().unwrap();
        let end = Instant::now() + Duration::from_millis(300);
        let mut sum = 0_u64;
        while Instant::now() < end {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let after = meter.used(&me).unwrap().unwrap();
        assert!(after.cpu > before.cpu, "{before:?} {after:?}");
        assert!(after.memory > 1 << 20);
    }
}
