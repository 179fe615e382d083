//! What one replica needs: CPU, memory, GPUs.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};

use super::{
    annotations::GPU_MEMORY,
    documents::join,
    model::Resources,
    quantity::{self, QuantityError},
    report::Report,
};

/// KServe's default CPU, request and limit: one core.
const DEFAULT_CPU_MILLIS: u64 = 1000;
/// KServe's default memory, request and limit: 2 GiB.
const DEFAULT_MEMORY_BYTES: u64 = 2 << 30;
const GPU: &str = "nvidia.com/gpu";
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
    amounts.check_others();
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
    Resources { gpus, gpu_memory_bytes, cpu_millis, cpu_limit_millis, memory_bytes, memory_limit_bytes }
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

    /// Whole GPUs. Where only limits are given the request equals the limit, as for every resource that
    /// cannot be overcommitted in Kubernetes.
    fn gpus(&mut self) -> u32 {
        let request = self.amount("requests", GPU, whole);
        let limit = self.amount("limits", GPU, whole);
        match (request, limit) {
            (Some(request), Some(limit)) if request != limit => {
                self.report.error(
                    self.path("requests", GPU),
                    request,
                    format!("must equal the limit, which is {limit}"),
                );
            }
            (Some(request), None) => {
                self.report.error(
                    self.path("requests", GPU),
                    request,
                    "must be given in limits too, with the same value",
                );
            }
            _ => {}
        }
        let count = limit.unwrap_or(0);
        if count > GPU_LIMIT {
            self.report.error(self.path("limits", GPU), count, format!("must be 0 to {GPU_LIMIT}"));
        }
        u32::try_from(count).unwrap_or_default()
    }

    fn amount(&mut self, list: &str, key: &str, read: fn(&str) -> Result<u64, QuantityError>) -> Option<u64> {
        let amounts = if list == "limits" { self.limits } else { self.requests };
        let given = amounts.get(key)?;
        match read(&given.0) {
            Ok(amount) => Some(amount),
            Err(error) => {
                let whole = if key == GPU { "a whole number of GPUs: " } else { "" };
                self.report.error(self.path(list, key), &given.0, format!("{whole}{error}"));
                None
            }
        }
    }

    /// Resources of other names: accelerators of another kind are an error, since nothing provides them.
    fn check_others(&mut self) {
        for (list, amounts) in [("requests", self.requests), ("limits", self.limits)] {
            for (key, amount) in amounts.iter().filter(|(key, _)| !["cpu", "memory", GPU].contains(&key.as_str())) {
                let at = self.path(list, key);
                if key.contains('/') {
                    self.report.error(
                        at,
                        &amount.0,
                        format!("is not supported by this version; known are cpu, memory and {GPU}"),
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
