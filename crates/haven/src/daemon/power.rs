//! The power of hosts, as the manager and the API of this host reach it: the sealed password opened, the driver asked.

use async_trait::async_trait;
use haven_control::manager::effects::Power;
use haven_host::fence::{Drivers, PowerDriver};
use haven_model::{Name, ObjectRef, PowerProblem, PowerSpec, PowerState, object::Kind};
use haven_store::seal::{ClusterKey, is_sealed};

/// Switches off hosts through their power controllers.
pub struct Powers {
    drivers: Drivers,
    secrets: Option<ClusterKey>,
}

impl Powers {
    /// With the key under which passwords are sealed, if this host has it.
    pub fn new(secrets: Option<ClusterKey>) -> Self {
        Self { drivers: Drivers::default(), secrets }
    }

    /// The spec with its password in the clear. One that a version before the drivers wrote is so already.
    fn open(&self, host: &Name, power: &PowerSpec) -> Result<PowerSpec, PowerProblem> {
        if !is_sealed(&power.password) {
            return Ok(power.clone());
        }
        let of = ObjectRef::new(Kind::Host, host.clone());
        let secrets = self.secrets.as_ref().ok_or_else(|| PowerProblem {
            message: format!(
                "this host cannot open the password of the power controller of {host}"
            ),
            hint: "the log of its daemon says why its key is missing".into(),
        })?;
        let plain = secrets.open(&of, &power.password).map_err(|error| PowerProblem {
            message: error.to_string(),
            hint: format!("`haven edit {of}`, with the password in the place of `sealed`"),
        })?;
        Ok(PowerSpec { password: plain.expose().to_owned(), ..power.clone() })
    }
}

#[async_trait]
impl Power for Powers {
    async fn state(&self, host: &Name, power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        self.drivers.state(&self.open(host, power)?).await
    }
    async fn off(&self, host: &Name, power: &PowerSpec) -> Result<(), PowerProblem> {
        self.drivers.off(&self.open(host, power)?).await
    }
}

#[cfg(test)]
mod tests {
    use super::Powers;
    use haven_model::{Name, ObjectRef, PowerSpec, object::Kind};
    use haven_store::{
        pki::Authority,
        seal::{ClusterKey, Plain},
    };

    #[test]
    fn a_password_is_opened_for_its_own_host_and_one_in_the_clear_is_taken_as_it_is() {
        let key = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
        let (one, two) = (Name::new("host1").unwrap(), Name::new("host2").unwrap());
        let of = ObjectRef::new(Kind::Host, one.clone());
        let sealed = key.seal(&of, &Plain::new("hush".into())).unwrap();
        let powers = Powers::new(Some(key));
        let spec = |password: &str| PowerSpec::redfish("http://x", "u", password);
        assert_eq!(powers.open(&one, &spec(&sealed)).unwrap(), spec("hush"));
        assert_eq!(powers.open(&one, &spec("clear")).unwrap(), spec("clear"));
        let other = powers.open(&two, &spec(&sealed)).unwrap_err();
        assert!(
            other.message.contains("does not open") && other.hint.contains("haven edit host/host2")
        );
        assert!(Powers::new(None).open(&one, &spec(&sealed)).is_err());
    }
}
