//! What one replica needs: CPU, memory, GPUs.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};

use super::{
    annotations::GPU_MEMORY,
    documents::join,
    model::{MigRequest, Resources},
    quantity::{self, QuantityError},
    report::Report,
};

/// KServe's default CPU, request and limit: one core.
const DEFAULT_CPU_MILLIS: u64 = 1000;
/// KServe's default memory, request and limit: 2 GiB.
const DEFAULT_MEMORY_BYTES: u64 = 2 << 30;
const GPU: &str = "nvidia.com/gpu";
/// Before the profile, such as `1g.10gb`.
const MIG: &str = "nvidia.com/mig-";
/// GPUs of the largest machines times the devices of one.
const MIG_LIMIT: u64 = 64;
/// More than any machine holds; keeps sums far from overflow.
const GPU_LIMIT: u64 = 1024;

type Amounts = BTreeMap<String, Quantity>;

/// What a container gets where it does not say.
#[derive(Clone, Copy)]
pub(super) enum Defaults {
    /// KServe's, for main containers.
    KServe,
    /// Nothing is requested, and there is no limit (0), as in Kubernetes.
    None,
}

/// Reads the resources of the container at `at`; missing keys get the defaults.
pub(super) fn read(
    given: Option<&ResourceRequirements>,
    gpu_memory_bytes: Option<u64>,
    defaults: Defaults,
    at: &str,
    report: &mut Report,
) -> Resources {
    let none = Amounts::new();
    let requests = given.and_then(|given| given.requests.as_ref()).unwrap_or(&none);
    let limits = given.and_then(|given| given.limits.as_ref()).unwrap_or(&none);
    let at = join(at, "resources");
    if given.is_some_and(|given| given.claims.is_some()) {
        report.error(join(&at, "claims"), "", "resource claims are not supported; use nvidia.com/gpu in limits");
    }
    let mut amounts = Reader { requests, limits, at: &at, report };
    let (default_cpu, default_memory) = match defaults {
        Defaults::KServe => (DEFAULT_CPU_MILLIS, DEFAULT_MEMORY_BYTES),
        Defaults::None => (0, 0),
    };
    let (cpu_millis, cpu_limit_millis) = amounts.pair("cpu", default_cpu, quantity::millis);
    let (memory_bytes, memory_limit_bytes) = amounts.pair("memory", default_memory, quantity::units);
    let mut gpus = amounts.gpus();
    let mig = amounts.mig();
    amounts.check_others();
    if let Some(mig) = mig.as_ref().filter(|_| gpus > 0 || gpu_memory_bytes.is_some()) {
        let key = format!("{MIG}{}", mig.profile);
        report.error(
            join(&join(&at, "limits"), &key),
            mig.count,
            format!("cannot be had together with {GPU} or annotation {GPU_MEMORY}"),
        );
    }
    if gpu_memory_bytes.is_some() {
        if gpus > 1 {
            report.error(
                join(&join(&at, "limits"), GPU),
                gpus,
                format!("must be 0 or 1 with annotation {GPU_MEMORY}, which shares one GPU"),
            );
        }
        gpus = 1;
    }
    Resources { gpus, gpu_memory_bytes, mig, cpu_millis, cpu_limit_millis, memory_bytes, memory_limit_bytes }
}

struct Reader<'a> {
    requests: &'a Amounts,
    limits: &'a Amounts,
    at: &'a str,
    report: &'a mut Report,
}

impl Reader<'_> {
    /// Request and limit of `key`. A default never contradicts what is given.
    fn pair(&mut self, key: &str, default: u64, read: fn(&str) -> Result<u64, QuantityError>) -> (u64, u64) {
        let request = self.amount("requests", key, read);
        let limit = self.amount("limits", key, read);
        if let Some((request, limit)) = request.zip(limit).filter(|(request, limit)| request > limit) {
            let given = self.requests.get(key).map_or_else(|| request.to_string(), |given| given.0.clone());
            let allowed = self.limits.get(key).map_or_else(|| limit.to_string(), |given| given.0.clone());
            self.report.error(
                self.path("requests", key),
                given,
                format!("must be at most the limit, which is {allowed}"),
            );
        }
        let request_or_default = request.unwrap_or_else(|| limit.map_or(default, |limit| default.min(limit)));
        (request_or_default, limit.unwrap_or_else(|| default.max(request_or_default)))
    }

    /// Whole GPUs.
    fn gpus(&mut self) -> u32 {
        self.devices(GPU, GPU_LIMIT)
    }

    /// MIG devices, of one profile: a replica that needs two kinds fits no model server that we know.
    fn mig(&mut self) -> Option<MigRequest> {
        let mut keys: Vec<String> = self.requests.keys().chain(self.limits.keys()).cloned().collect();
        keys.retain(|key| key.starts_with(MIG));
        keys.sort();
        keys.dedup();
        let mut found = None;
        for key in keys {
            let profile = key[MIG.len()..].to_owned();
            let count = self.devices(&key, MIG_LIMIT);
            if !is_profile(&profile) {
                self.report.error(
                    self.path("limits", &key),
                    count,
                    "must name a profile, such as 1g.10gb or 1g.10gb.me",
                );
            } else if count > 0 && found.is_some() {
                self.report.error(self.path("limits", &key), count, "must be the only MIG profile of the container");
            } else if count > 0 {
                found = Some(MigRequest { profile, count });
            }
        }
        found
    }

    /// Whole devices. Where only limits are given the request equals the limit, as for every resource that
    /// cannot be overcommitted in Kubernetes.
    fn devices(&mut self, key: &str, most: u64) -> u32 {
        let request = self.amount("requests", key, whole);
        let limit = self.amount("limits", key, whole);
        match (request, limit) {
            (Some(request), Some(limit)) if request != limit => {
                self.report.error(
                    self.path("requests", key),
                    request,
                    format!("must equal the limit, which is {limit}"),
                );
            }
            (Some(request), None) => {
                self.report.error(
                    self.path("requests", key),
                    request,
                    "must be given in limits too, with the same value",
                );
            }
            _ => {}
        }
        let count = limit.unwrap_or(0);
        if count > most {
            self.report.error(self.path("limits", key), count, format!("must be 0 to {most}"));
        }
        u32::try_from(count).unwrap_or_default()
    }

    fn amount(&mut self, list: &str, key: &str, read: fn(&str) -> Result<u64, QuantityError>) -> Option<u64> {
        let amounts = if list == "limits" { self.limits } else { self.requests };
        let given = amounts.get(key)?;
        match read(&given.0) {
            Ok(amount) => Some(amount),
            Err(error) => {
                let whole = match key {
                    GPU => "a whole number of GPUs: ",
                    mig if mig.starts_with(MIG) => "a whole number of MIG devices: ",
                    _ => "",
                };
                self.report.error(self.path(list, key), &given.0, format!("{whole}{error}"));
                None
            }
        }
    }

    /// Resources of other names: accelerators of another kind are an error, since nothing provides them.
    fn check_others(&mut self) {
        for (list, amounts) in [("requests", self.requests), ("limits", self.limits)] {
            let known = |key: &str| ["cpu", "memory", GPU].contains(&key) || key.starts_with(MIG);
            for (key, amount) in amounts.iter().filter(|(key, _)| !known(key)) {
                let at = self.path(list, key);
                if key.contains('/') {
                    self.report.error(
                        at,
                        &amount.0,
                        format!("is not supported by this version; known are cpu, memory, {GPU} and {MIG}<profile>"),
                    );
                } else {
                    self.report.unsupported(at, "not counted");
                }
            }
        }
    }

    fn path(&self, list: &str, key: &str) -> String {
        join(&join(self.at, list), key)
    }
}

/// A quantity without a fraction: half a GPU is an error, not a whole one.
fn whole(text: &str) -> Result<u64, QuantityError> {
    let units = quantity::units(text)?;
    if quantity::millis(text)? == units.saturating_mul(1000) { Ok(units) } else { Err(QuantityError::Malformed) }
}

/// True for `1g.10gb`, and with attributes as in `1g.10gb.me`.
fn is_profile(text: &str) -> bool {
    let number =
        |word: &str, unit: &str| word.strip_suffix(unit).is_some_and(|n| n.parse::<u16>().is_ok_and(|n| n > 0));
    let mut words = text.split('.');
    let (slices, memory) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    // "1c.2g.10gb" is a part of a part, which the device plugin does not offer either.
    number(slices, "g")
        && number(memory, "gb")
        && words.all(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(amounts: &[(&str, &str)], gpu_memory: Option<u64>) -> (Resources, Vec<String>) {
        let limits = amounts.iter().map(|(key, amount)| ((*key).to_owned(), Quantity((*amount).to_owned()))).collect();
        let given = ResourceRequirements { limits: Some(limits), ..Default::default() };
        let mut report = Report::new(false);
        let resources = read(Some(&given), gpu_memory, Defaults::KServe, "c", &mut report);
        (resources, report.into_findings().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn mig_devices_are_counted_by_profile() {
        let (resources, findings) = limits(&[("nvidia.com/mig-1g.10gb", "2")], None);
        assert!(findings.is_empty(), "{findings:?}");
        assert_eq!(resources.mig, Some(MigRequest { profile: "1g.10gb".into(), count: 2 }));
        assert_eq!(resources.gpus, 0);
        let (resources, findings) = limits(&[("nvidia.com/mig-1g.10gb", "0"), ("nvidia.com/gpu", "1")], None);
        assert!(findings.is_empty() && resources.mig.is_none(), "{findings:?}");
    }

    #[test]
    fn what_mig_cannot_be_is_refused_by_name() {
        let refused = |amounts: &[(&str, &str)], memory, part: &str| {
            let (_, findings) = limits(amounts, memory);
            assert!(findings.len() == 1 && findings[0].contains(part), "{findings:?}");
            assert!(findings[0].contains("nvidia.com/mig-"), "{findings:?}");
        };
        refused(&[("nvidia.com/mig-1g.10gb", "1"), ("nvidia.com/gpu", "1")], None, "cannot be had together");
        refused(&[("nvidia.com/mig-1g.10gb", "1")], Some(1 << 30), "cannot be had together");
        refused(&[("nvidia.com/mig-1g.10gb", "1"), ("nvidia.com/mig-2g.20gb", "1")], None, "only MIG profile");
        refused(&[("nvidia.com/mig-big", "1")], None, "must name a profile");
        refused(&[("nvidia.com/mig-1g.10gb", "0.5")], None, "a whole number of MIG devices");
        refused(&[("nvidia.com/mig-1g.10gb", "65")], None, "must be 0 to 64");
    }
}
