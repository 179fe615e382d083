//! Manifests for stories.

/// KServe's own sample: two flowers, both versicolor.
pub const TWO_FLOWERS: &str = r#"{"instances": [[6.8, 2.8, 4.8, 1.4], [6.0, 3.4, 4.5, 1.6]]}"#;

/// Annotations of a service that begins at zero, and goes back with the shortest windows that Knative allows.
const TO_ZERO: [(&str, &str); 4] = [
    ("autoscaling.knative.dev/initial-scale", "0"),
    ("autoscaling.knative.dev/window", "6s"),
    ("autoscaling.knative.dev/scale-down-delay", "0s"),
    ("autoscaling.knative.dev/scale-to-zero-pod-retention-period", "0s"),
];

fn lines(annotations: &[(&str, &str)]) -> String {
    annotations.iter().map(|(key, value)| format!("    {key}: {value:?}\n")).collect()
}

/// A service that begins at zero and goes back there soon, with further annotations; `predictor` is all that is
/// below `spec.predictor`, indented by four.
pub fn to_zero(name: &str, further: &[(&str, &str)], predictor: &str) -> String {
    let annotations = lines(&[&TO_ZERO, further].concat());
    format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: {name}\n  annotations:\n\
         {annotations}spec:\n  predictor:\n{predictor}"
    )
}

/// An iris service.
#[derive(Debug, Clone)]
pub struct Iris {
    /// Service name.
    pub name: &'static str,
    /// `minReplicas`.
    pub min_replicas: i64,
    /// `maxReplicas`.
    pub max_replicas: i64,
    /// `containerConcurrency`.
    pub container_concurrency: i64,
    /// `canaryTrafficPercent`.
    pub canary: Option<u8>,
    /// GPUs of each replica.
    pub gpus: u32,
    /// Further flags of the example server.
    pub flags: Vec<&'static str>,
    /// Further annotations.
    pub annotations: Vec<(&'static str, &'static str)>,
}

impl Default for Iris {
    fn default() -> Self {
        Self {
            name: "iris",
            min_replicas: 0,
            max_replicas: 4,
            container_concurrency: 10,
            canary: None,
            gpus: 0,
            flags: Vec::new(),
            annotations: Vec::new(),
        }
    }
}

impl Iris {
    /// As YAML, with the shortest windows that Knative allows.
    pub fn yaml(&self) -> String {
        let mut annotations = TO_ZERO.to_vec();
        annotations.retain(|(key, _)| !self.annotations.iter().any(|(own, _)| own == key));
        annotations.extend(&self.annotations);
        let annotations = lines(&annotations);
        let mut command = vec!["pilotlight", "example-server", "iris"];
        command.extend(&self.flags);
        let resources = match self.gpus {
            0 => String::new(),
            gpus => format!("\n      resources: {{limits: {{nvidia.com/gpu: {gpus}}}}}"),
        };
        let canary = self.canary.map(|percent| format!("    canaryTrafficPercent: {percent}\n")).unwrap_or_default();
        format!(
            "apiVersion: serving.kserve.io/v1beta1\n\
             kind: InferenceService\n\
             metadata:\n  name: {name}\n  annotations:\n{annotations}\
             spec:\n  predictor:\n    minReplicas: {min}\n    maxReplicas: {max}\n    containerConcurrency: {concurrency}\n{canary}    \
             containers:\n    - name: kserve-container\n      image: pilotlight:dev\n      command: {command:?}\n      \
             readinessProbe: {{httpGet: {{path: /v1/models/iris, port: 8080}}}}\n      \
             ports: [{{containerPort: 8080, name: http1}}]{resources}\n",
            name = self.name,
            min = self.min_replicas,
            max = self.max_replicas,
            concurrency = self.container_concurrency,
        )
    }
}
