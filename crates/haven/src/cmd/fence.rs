//! `haven host fence …`: whether a host could be switched off.

use super::reference;
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Subcommand;
use haven_model::{
    object::Kind,
    power::{FenceTest, PowerReading},
};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum FenceCommand {
    /// Read a host's power as the hosts would that may have to switch it off; nothing is switched
    #[command(
        after_help = "Examples:\n  haven host fence test host1\n  haven host fence test host1 -o json"
    )]
    Test {
        /// The host whose power is read
        name: String,
        #[command(flatten)]
        how: How,
    },
}

/// Runs it.
pub async fn run(command: FenceCommand) -> Result<(), Failure> {
    let FenceCommand::Test { name, how } = command;
    let host = reference(Kind::Host, &name)?.name;
    let told = connect().await?.fence_test(host.as_str()).await?;
    out::print(&render::value(&told, how.output, |_| table(&told)));
    verdict(&told)
}

fn table(told: &FenceTest) -> String {
    let row = |reading: &PowerReading| {
        let from = if reading.manages { " (manager)" } else { "" };
        let power = reading.state.map_or_else(|| "?".to_owned(), |state| state.to_string());
        let took = reading.state.map_or_else(String::new, |_| format!("{} ms", reading.took_ms));
        vec![format!("{}{from}", reading.from), power, took]
    };
    let rows = told.readings.iter().map(row).collect();
    let head = format!("the power of {}, over {}: {}\n", told.host, told.driver, told.at);
    head + &render::table(&["from", "power", "took"], rows)
}

/// Any host may be the one that manages when it matters, so one that cannot is a failure of the test.
fn verdict(told: &FenceTest) -> Result<(), Failure> {
    let problems: Vec<_> =
        told.readings.iter().filter_map(|r| Some((&r.from, r.problem.as_ref()?))).collect();
    let Some((_, first)) = problems.first() else { return Ok(()) };
    let (host, all) = (&told.host, problems.len() == told.readings.len());
    let from: Vec<&str> = problems.iter().map(|(from, _)| from.as_str()).collect();
    let whence = if all { "any host".into() } else { from.join(", ") };
    let mut said: Vec<&str> = Vec::new();
    for (_, problem) in &problems {
        if !said.contains(&problem.message.as_str()) {
            said.push(&problem.message);
        }
    }
    let message = format!("{host} could not be switched off from {whence}: {}", said.join("; "));
    Err(Failure::failed(message, first.hint.clone()))
}

#[cfg(test)]
mod tests {
    use super::{table, verdict};
    use haven_model::{
        Name, PowerKind, PowerProblem, PowerState,
        power::{FenceTest, PowerReading},
    };

    fn reading(from: &str, manages: bool, problem: Option<&str>) -> PowerReading {
        PowerReading {
            from: Name::new(from).unwrap(),
            manages,
            state: problem.is_none().then_some(PowerState::On),
            problem: problem
                .map(|what| PowerProblem { message: what.into(), hint: "mend it".into() }),
            took_ms: 12,
        }
    }

    fn told(readings: Vec<PowerReading>) -> FenceTest {
        let at = "https://10.0.0.9".into();
        FenceTest { host: Name::new("host1").unwrap(), driver: PowerKind::Redfish, at, readings }
    }

    #[test]
    fn what_each_host_read_is_a_line_and_one_that_cannot_read_fails_the_test() {
        let well = told(vec![reading("host2", true, None), reading("host3", false, None)]);
        let half =
            told(vec![reading("host2", true, None), reading("host3", false, Some("no route"))]);
        let none = told(vec![
            reading("host2", true, Some("wrong")),
            reading("host3", false, Some("wrong")),
        ]);
        assert!(verdict(&well).is_ok());
        let shown = [&well, &half, &none].map(|told| {
            let end = verdict(told).err().map(|failure| failure.to_string());
            format!("{}{}", table(told), end.unwrap_or_default())
        });
        insta::assert_snapshot!(shown.join("\n"));
    }
}
