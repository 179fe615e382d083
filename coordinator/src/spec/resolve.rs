//! A model and its serving runtime become one pod.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1 as k8s;
use serde_json::{Map, Value, json};

use super::{
    component::Context,
    container::{self, MAIN, Part, Place, TRANSFORMER},
    documents::join,
    framework::Model,
    image, merge,
    model::{Probe, ProbeHandler, RuntimeUse, Storage},
    placeholders::{self, Metadata},
    pod::{self, Around, Main, ReadPod},
    probe,
    report::{Report, replace_prefix},
    resources::{self, Defaults},
    runtimes::{NoRuntime, Wanted},
    serving_runtime::{Protocol, ServingRuntime},
    storage, typed,
};

/// How long a server may take to say that it has loaded its model.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of a model.
pub(super) struct Made {
    pub(super) pod: ReadPod,
    pub(super) runtime: RuntimeUse,
    pub(super) storage: Vec<Storage>,
    /// The runtime's own, for its replicas.
    pub(super) annotations: BTreeMap<String, String>,
}

/// Finds the runtime of the model at `at_model`, and merges it with the component's pod, which stands at
/// `at`. `None` where something in the model itself is wrong.
pub(super) fn read(
    mut model: Model,
    at_model: &str,
    pod: &Map<String, Value>,
    at: &str,
    around: Around,
    context: Context<'_>,
    report: &mut Report,
) -> Option<Made> {
    let metadata = Metadata {
        name: context.name,
        namespace: context.namespace,
        labels: context.labels,
        annotations: context.annotations,
    };
    let storage = read_storage(&mut model, at_model, around, report);
    check_fragment(&model, at_model, around, report);
    let runtime = match context.options.runtimes.select(wanted(&model, context.namespace)) {
        Ok(runtime) => runtime,
        Err(why) => {
            let (field, value) = match (&why, &model.runtime) {
                (_, Some(name)) => ("runtime", name),
                (NoRuntime::NotSupporting(_), None) | (_, None) => ("modelFormat", &model.format),
            };
            report.error(join(at_model, field), value, why.to_string());
            return None;
        }
    };
    let protocol = model.protocol.or(runtime.lowest_protocol());
    let mut labels = metadata.labels.clone();
    set_server_defaults(&mut model, &runtime, protocol, !storage.is_empty(), context.name, &mut labels);
    let metadata = Metadata { labels: &labels, ..metadata };
    let merged = merged_pod(&model, &runtime, pod, at_model, metadata, report);
    let model_name = model_name(&merged, context.name);
    let probed = main_of(&merged).is_some_and(|main| main.contains_key("readinessProbe"));

    let mut made = Report::new(false);
    let mut read = pod::read_within(Value::Object(merged), at, Main::Merged, around, &mut made);
    let main_at = read.main.as_ref().map(|main| main.at.clone()).unwrap_or_default();
    report.add_errors(made, |path| replace_prefix(path, &[(&main_at, at_model)]));
    if let Some(main) = read.main.as_mut().filter(|main| !probed && !main.container.h2c) {
        main.container.readiness = model_ready(protocol, &model_name);
    }
    Some(Made {
        pod: read,
        storage,
        annotations: runtime.annotations.clone(),
        runtime: RuntimeUse {
            name: runtime.name.clone(),
            cluster: runtime.namespace.is_none(),
            format: model.format,
            protocol,
            model_name,
        },
    })
}

fn wanted<'a>(model: &'a Model, namespace: &'a str) -> Wanted<'a> {
    Wanted {
        namespace,
        runtime: model.runtime.as_deref(),
        format: &model.format,
        version: model.version.as_deref(),
        protocol: model.protocol,
    }
}

fn read_storage(model: &mut Model, at: &str, around: Around, report: &mut Report) -> Vec<Storage> {
    let by_uri = model
        .storage_uri
        .as_deref()
        .and_then(|uri| storage::by_uri(uri, &join(at, "storageUri"), !around.writable, report));
    let at = join(at, "storage");
    let by_entry = model.storage.take().map(|given| storage::by_entry(given, !around.writable));
    if by_uri.is_some() && by_entry.is_some() {
        report.error(at, "", "must not be given together with storageUri");
    }
    by_uri.into_iter().chain(by_entry).collect()
}

/// What can be said of the container's fields where they stand, before they are merged.
fn check_fragment(model: &Model, at: &str, around: Around, report: &mut Report) {
    let mut raw = Value::Object(model.container.clone());
    typed::quantities_to_text(&mut raw);
    let given: k8s::Container = typed::read(&mut raw, at, report);
    let place = Place { part: Part::Fragment, at, volumes: &[], read_only: !around.writable, security: None };
    container::read(&given, &raw, place, report);
    resources::read(given.resources.as_ref(), around.gpu_memory_bytes, Defaults::KServe, at, report);
}

/// What KServe sets for some servers before it merges.
fn set_server_defaults(
    model: &mut Model,
    runtime: &ServingRuntime,
    protocol: Option<Protocol>,
    has_storage: bool,
    service: &str,
    labels: &mut BTreeMap<String, String>,
) {
    match runtime.server_type.as_str() {
        "torchserve" => {
            let v2 = matches!(protocol, Some(Protocol::V2 | Protocol::GrpcV2));
            let envelope = if v2 { "kservev2" } else { "kserve" };
            labels.entry("serviceEnvelope".to_owned()).or_insert_with(|| envelope.to_owned());
            let protocol = protocol.unwrap_or(Protocol::V1);
            set_variable(&mut model.container, "PROTOCOL_VERSION", &protocol.to_string());
        }
        "mlserver" => {
            set_variable(&mut model.container, "MLSERVER_MODEL_NAME", service);
            if has_storage {
                set_variable(&mut model.container, "MLSERVER_MODEL_URI", storage::MOUNT_PATH);
            }
        }
        // Without a repository Triton would load nothing and end.
        "tritonserver" if !has_storage => {
            let args = model.container.entry("args").or_insert_with(|| json!([]));
            if let Value::Array(args) = args {
                args.push(json!("--model-control-mode=explicit"));
            }
        }
        _ => {}
    }
}

fn set_variable(container: &mut Map<String, Value>, name: &str, value: &str) {
    if let Value::Array(env) = container.entry("env").or_insert_with(|| json!([]))
        && !env.iter().any(|variable| variable["name"] == name)
    {
        env.push(json!({ "name": name, "value": value }));
    }
}

/// Runtime and service as one, with placeholders filled and the image chosen.
fn merged_pod(
    model: &Model,
    runtime: &Arc<ServingRuntime>,
    pod: &Map<String, Value>,
    at_model: &str,
    metadata: Metadata<'_>,
    report: &mut Report,
) -> Map<String, Value> {
    // What the service itself writes is checked where it stands, what the runtime writes on its behalf.
    placeholders::fill_all(&mut Value::Object(model.container.clone()), at_model, metadata, report);
    let said = report.has_errors();
    let mut merged = merge::pod(&runtime.pod, pod, &model.container);
    let mut made = Report::new(false);
    let containers = merged.get_mut("containers").and_then(Value::as_array_mut).into_iter().flatten();
    for container in containers.filter(|container| [MAIN, TRANSFORMER].iter().any(|name| container["name"] == **name)) {
        placeholders::fill_all(container, "", metadata, &mut made);
        if container["name"] == MAIN {
            choose_image(container, model, runtime);
        }
    }
    if let Some(finding) = made.into_findings().into_iter().find(|_| !said) {
        report.error(join(at_model, "runtime"), &runtime.name, format!("{}: {}", finding.field, finding.message));
    }
    merged
}

fn choose_image(container: &mut Value, model: &Model, runtime: &ServingRuntime) {
    let amount = |list: &str| container["resources"][list]["nvidia.com/gpu"].clone();
    let gpu =
        [amount("limits"), amount("requests")].iter().any(|amount| !amount.is_null() && *amount != "0" && *amount != 0);
    if let Some(given) = container["image"].as_str() {
        let chosen = image::choose(given, model.runtime_version.as_deref(), &runtime.server_type, gpu);
        container["image"] = json!(chosen);
    }
}

fn main_of(pod: &Map<String, Value>) -> Option<&Map<String, Value>> {
    named(pod, MAIN)
}

fn named<'a>(pod: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    let containers = pod.get("containers")?.as_array()?;
    containers.iter().find(|container| container["name"] == name)?.as_object()
}

/// Name of the model in the server's URLs: the transformer's `--model_name`, else MLServer's variable,
/// else the predictor's `--model_name`, else the service's name.
fn model_name(pod: &Map<String, Value>, service: &str) -> String {
    let by_argument = |container: &Map<String, Value>| -> Option<String> {
        let args: Vec<&str> = container.get("args")?.as_array()?.iter().filter_map(Value::as_str).collect();
        let joined = args.iter().rev().find_map(|arg| arg.strip_prefix("--model_name="));
        let apart = || args.windows(2).rev().find(|pair| pair[0] == "--model_name").map(|pair| pair[1]);
        joined.or_else(apart).map(ToOwned::to_owned)
    };
    let by_variable = |container: &Map<String, Value>| -> Option<String> {
        let env = container.get("env")?.as_array()?;
        let variable = env.iter().find(|variable| variable["name"] == "MLSERVER_MODEL_NAME")?;
        Some(variable["value"].as_str()?.to_owned())
    };
    let (transformer, main) = (named(pod, TRANSFORMER), main_of(pod));
    transformer
        .and_then(by_argument)
        .or_else(|| main.and_then(by_variable))
        .or_else(|| main.and_then(by_argument))
        .unwrap_or_else(|| service.to_owned())
}

/// Ready means loaded: where the protocol can be asked for that, it is.
fn model_ready(protocol: Option<Protocol>, model: &str) -> Probe {
    let path = match protocol {
        Some(Protocol::V1) => format!("/v1/models/{model}"),
        Some(Protocol::V2) => format!("/v2/models/{model}/ready"),
        Some(Protocol::GrpcV1 | Protocol::GrpcV2) | None => return probe::default(),
    };
    let handler = ProbeHandler::HttpGet { path, port: None, headers: BTreeMap::new() };
    Probe { handler, timeout: READY_TIMEOUT, ..probe::default() }
}
