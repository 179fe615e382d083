//! The runtimes that a service may use, and which of them it gets.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use jiff::Timestamp;

use super::{
    ParseOptions, Resource,
    serving_runtime::{Protocol, ServingRuntime},
};

/// The runtimes that are there without being applied; an applied one of the same name takes the place.
const BUILT_IN: [&str; 11] = [
    include_str!("../../../deploy/runtimes/huggingface.yaml"),
    include_str!("../../../deploy/runtimes/lightgbm.yaml"),
    include_str!("../../../deploy/runtimes/openvino.yaml"),
    include_str!("../../../deploy/runtimes/paddle-pmml.yaml"),
    include_str!("../../../deploy/runtimes/sklearn.yaml"),
    include_str!("../../../deploy/runtimes/tensorflow.yaml"),
    include_str!("../../../deploy/runtimes/torchserve.yaml"),
    include_str!("../../../deploy/runtimes/triton.yaml"),
    include_str!("../../../deploy/runtimes/vllm.yaml"),
    include_str!("../../../deploy/runtimes/vllm-sleep.yaml"),
    include_str!("../../../deploy/runtimes/xgboost.yaml"),
];

static READ: LazyLock<Runtimes> = LazyLock::new(|| {
    let mut runtimes = Runtimes::default();
    let options = ParseOptions {
        default_namespace: "",
        strict: false,
        validate_scaling: &|_, _| Vec::new(),
        runtimes: &runtimes,
    };
    let read = BUILT_IN.iter().flat_map(|text| super::parse(text, options)).collect::<Vec<_>>();
    for document in read {
        if let Some(Resource::ServingRuntime(runtime)) = document.object {
            runtimes.insert(*runtime, None);
        }
    }
    runtimes
});

/// A runtime and when it was made; those that are built in have no time.
type Entry = (Arc<ServingRuntime>, Option<Timestamp>);

/// The runtimes of all namespaces and of the cluster.
#[derive(Debug, Clone, Default)]
pub struct Runtimes {
    /// By namespace and name; the cluster's namespace is `None`.
    entries: BTreeMap<(Option<String>, String), Entry>,
}

/// Why a service gets no runtime; the names are KServe's failure reasons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRuntime {
    /// The one asked for is not there.
    #[error("RuntimeNotRecognized: there is no such runtime; known are: {0}")]
    NotRecognized(String),
    /// The one asked for is switched off.
    #[error("RuntimeDisabled: the runtime is disabled")]
    Disabled,
    /// The one asked for does not serve the model, or none does.
    #[error("NoSupportingRuntime: {0}")]
    NotSupporting(String),
}

/// What a model asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) namespace: &'a str,
    pub(super) runtime: Option<&'a str>,
    pub(super) format: &'a str,
    pub(super) version: Option<&'a str>,
    pub(super) protocol: Option<Protocol>,
}

impl Runtimes {
    /// Those of `deploy/runtimes/`.
    pub fn built_in() -> Self {
        READ.clone()
    }

    /// All of them: the cluster's first, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ServingRuntime>> {
        self.entries.values().map(|(runtime, _)| runtime)
    }

    /// Adds a runtime, in the place of one of the same name.
    pub fn insert(&mut self, runtime: ServingRuntime, created: Option<Timestamp>) {
        let key = (runtime.namespace.clone(), runtime.name.clone());
        self.entries.insert(key, (Arc::new(runtime), created));
    }

    /// The runtime for a model, by KServe's rules: the one that is named, else the best one for its format.
    pub(super) fn select(&self, wanted: Wanted<'_>) -> Result<Arc<ServingRuntime>, NoRuntime> {
        match wanted.runtime {
            Some(name) => self.named(name, wanted),
            None => self.best(wanted),
        }
    }

    /// A namespaced runtime wins over the cluster's of the same name, and a name over an alias.
    fn find(&self, namespace: &str, name: &str) -> Option<&Arc<ServingRuntime>> {
        let scopes = [Some(namespace.to_owned()), None];
        let by_name = scopes.iter().find_map(|scope| self.entries.get(&(scope.clone(), name.to_owned())));
        let by_alias = || {
            let aliased = |(runtime, _): &&Entry| runtime.aliases.iter().any(|alias| alias == name);
            self.entries.values().filter(|(runtime, _)| runtime.namespace.is_none()).find(aliased)
        };
        by_name.or_else(by_alias).map(|(runtime, _)| runtime)
    }

    fn named(&self, name: &str, wanted: Wanted<'_>) -> Result<Arc<ServingRuntime>, NoRuntime> {
        let here = |runtime: &&Arc<ServingRuntime>| {
            runtime.namespace.as_deref().is_none_or(|namespace| namespace == wanted.namespace)
        };
        let runtime = self.find(wanted.namespace, name).ok_or_else(|| {
            let known: Vec<_> = self.iter().filter(here).map(|runtime| runtime.name.as_str()).collect();
            NoRuntime::NotRecognized(known.join(", "))
        })?;
        if runtime.disabled {
            return Err(NoRuntime::Disabled);
        }
        if let Some(protocol) = wanted.protocol.filter(|protocol| !runtime.speaks(*protocol)) {
            let spoken: Vec<_> = runtime.protocols.iter().map(ToString::to_string).collect();
            let message = format!("runtime {name} does not speak {protocol}; it speaks {}", spoken.join(", "));
            return Err(NoRuntime::NotSupporting(message));
        }
        if !runtime.serves(wanted.format, wanted.version, false) {
            let message = format!("runtime {name} does not serve {}", described(wanted));
            return Err(NoRuntime::NotSupporting(message));
        }
        if runtime.multi_model || runtime.multi_node {
            let message = format!("runtime {name} is for several models or nodes, which this fleet does not have");
            return Err(NoRuntime::NotSupporting(message));
        }
        Ok(Arc::clone(runtime))
    }

    fn best(&self, wanted: Wanted<'_>) -> Result<Arc<ServingRuntime>, NoRuntime> {
        let protocol = wanted.protocol.unwrap_or(Protocol::V1);
        let fits = |(runtime, _): &&Entry| {
            let here = runtime.namespace.as_deref().is_none_or(|namespace| namespace == wanted.namespace);
            let single = !runtime.disabled && !runtime.multi_model && !runtime.multi_node;
            here && single && runtime.serves(wanted.format, wanted.version, true) && runtime.speaks(protocol)
        };
        let best = self.entries.values().filter(fits).min_by_key(|(runtime, created)| {
            let priority = runtime.priority(wanted.format);
            (
                runtime.namespace.is_none(),
                priority.is_none(),
                Reverse(priority),
                // One that lists no protocol comes after all that do.
                runtime.protocols.is_empty(),
                runtime.lowest_protocol(),
                Reverse(*created),
                runtime.name.clone(),
            )
        });
        best.map(|(runtime, _)| Arc::clone(runtime)).ok_or_else(|| {
            let unset = if wanted.protocol.is_none() { " (protocolVersion is not given, which means v1)" } else { "" };
            NoRuntime::NotSupporting(format!("no runtime serves {} with {protocol}{unset}", described(wanted)))
        })
    }
}

fn described(wanted: Wanted<'_>) -> String {
    match wanted.version {
        Some(version) => format!("format {} of version {version}", wanted.format),
        None => format!("format {}", wanted.format),
    }
}
