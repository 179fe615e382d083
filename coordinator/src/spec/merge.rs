//! A service's pod fields laid over those of its runtime, as Kubernetes' strategic merge does.

use serde_json::{Map, Value};

use super::container::MAIN;

/// Lists whose entries are told apart by a key; all other lists are replaced as a whole.
const KEYED: [(&str, &str); 9] = [
    ("env", "name"),
    ("ports", "containerPort"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
    ("volumes", "name"),
    ("imagePullSecrets", "name"),
    ("resourceClaims", "name"),
    ("hostAliases", "ip"),
    ("topologySpreadConstraints", "topologyKey"),
];

/// The pod of a service whose model runs in `runtime`'s main container, changed by the fields of `model`.
pub(super) fn pod(
    runtime: &Map<String, Value>,
    service: &Map<String, Value>,
    model: &Map<String, Value>,
) -> Map<String, Value> {
    let (mut runtime, mut service) = (runtime.clone(), service.clone());
    let mut containers = list(runtime.remove("containers"));
    let own = list(service.remove("containers"));
    for container in containers.iter_mut().filter(|container| container["name"] == MAIN) {
        if let Value::Object(fields) = container {
            *fields = main(fields, model);
        }
    }
    for container in own {
        let same = |there: &&mut Value| there["name"] == container["name"];
        match (containers.iter_mut().find(same), container) {
            (Some(Value::Object(there)), Value::Object(own)) => overlay(there, &own),
            (_, other) => containers.push(other),
        }
    }
    overlay(&mut runtime, &service);
    runtime.insert("containers".into(), Value::Array(containers));
    runtime
}

/// The main container: args follow those of the runtime, all else is laid over. The service's first
/// port is the serving port.
fn main(runtime: &Map<String, Value>, model: &Map<String, Value>) -> Map<String, Value> {
    let mut merged = runtime.clone();
    let (mut args, more) = (list(runtime.get("args").cloned()), list(model.get("args").cloned()));
    args.extend(more);
    overlay(&mut merged, model);
    if !args.is_empty() {
        merged.insert("args".into(), Value::Array(args));
    }
    if let Some(port) = list(model.get("ports").cloned()).into_iter().next() {
        let mut ports = list(merged.remove("ports"));
        if let Some(place) = ports.iter().position(|there| there["containerPort"] == port["containerPort"]) {
            ports[..=place].rotate_right(1);
        }
        merged.insert("ports".into(), Value::Array(ports));
    }
    merged
}

fn list(value: Option<Value>) -> Vec<Value> {
    if let Some(Value::Array(values)) = value { values } else { Vec::new() }
}

/// Lays `over` over `under`: mappings are joined, keyed lists by key, the rest is replaced.
fn overlay(under: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (key, value) in over {
        match (under.get_mut(key), value) {
            (_, Value::Null) => drop(under.remove(key)),
            (Some(Value::Object(there)), Value::Object(value)) => overlay(there, value),
            (Some(Value::Array(there)), Value::Array(values)) => match KEYED.iter().find(|(list, _)| list == key) {
                Some((_, merge_key)) => overlay_list(there, values, merge_key),
                None => there.clone_from(values),
            },
            _ => drop(under.insert(key.clone(), value.clone())),
        }
    }
}

fn overlay_list(under: &mut Vec<Value>, over: &[Value], merge_key: &str) {
    for value in over {
        let same = |there: &&mut Value| !value[merge_key].is_null() && there[merge_key] == value[merge_key];
        match (under.iter_mut().find(same), value) {
            // Sources are alternatives: a variable or a volume from elsewhere replaces the one before.
            (Some(there), value) if replaces(there, value) => there.clone_from(value),
            (Some(Value::Object(there)), Value::Object(value)) => overlay(there, value),
            _ => under.push(value.clone()),
        }
    }
}

fn replaces(there: &Value, value: &Value) -> bool {
    let variable = |entry: &Value| entry.get("value").is_some() || entry.get("valueFrom").is_some();
    let volume = |entry: &Value| entry.get("emptyDir").is_some() || entry.get("persistentVolumeClaim").is_some();
    (variable(there) && variable(value)) || (volume(there) && value.as_object().is_some_and(|fields| fields.len() > 1))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn args_are_appended_and_the_rest_is_laid_over() {
        let runtime = object(json!({
            "containers": [{
                "name": MAIN, "image": "a:1", "command": ["x"], "args": ["--one"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"containerPort": 8080}], "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}
            }],
            "nodeSelector": {"a": "1"}, "tolerations": [{"key": "x"}]
        }));
        let service = object(json!({
            "nodeSelector": {"b": "2"}, "tolerations": [{"key": "y"}], "containers": [{"name": "beside"}]
        }));
        let model = object(json!({
            "args": ["--two"], "command": ["y"], "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
            "ports": [{"containerPort": 9000, "name": "h2c"}], "resources": {"limits": {"cpu": "2"}}
        }));
        let merged = pod(&runtime, &service, &model);
        assert_eq!(
            Value::Object(merged),
            json!({
                "containers": [{
                    "name": MAIN, "image": "a:1", "command": ["y"], "args": ["--one", "--two"],
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
                    "ports": [{"containerPort": 9000, "name": "h2c"}, {"containerPort": 8080}],
                    "resources": {"limits": {"cpu": "2", "memory": "2Gi"}}
                }, {"name": "beside"}],
                "nodeSelector": {"a": "1", "b": "2"}, "tolerations": [{"key": "y"}]
            })
        );
    }

    #[test]
    fn a_variable_from_elsewhere_replaces_the_value() {
        let mut under = object(json!({"env": [{"name": "A", "value": "1"}]}));
        overlay(&mut under, &object(json!({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]})));
        assert_eq!(under["env"], json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]));
    }
}
