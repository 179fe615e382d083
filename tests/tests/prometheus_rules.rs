//! The rules in `deploy/prometheus` are valid, fire when they should, and name only documented metrics.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs `promtool` in `deploy/prometheus` and panics with its output if it fails.
fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(root().join("deploy/prometheus"))
        .output()
        .expect("this test needs promtool; scripts/test.sh installs it (Debian: prometheus)");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}: {stdout}{stderr}");
}

#[test]
fn rules_are_valid_and_alerts_fire_when_they_should() {
    promtool(&["check", "rules", "rules.yaml"]);
    promtool(&["test", "rules", "rules_test.yaml"]);
}

#[test]
fn rules_name_only_documented_metrics() {
    const PREFIXES: [&str; 6] = ["coordinator_", "gateway_", "http_server_", "tls_", "rpc_server_", "gpu_"];
    let rules = std::fs::read_to_string(root().join("deploy/prometheus/rules.yaml")).unwrap();
    let documented = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut metrics = 0;
    for name in rules.split(|c: char| !is_name(c)).filter(|word| PREFIXES.iter().any(|p| word.starts_with(p))) {
        let metric = name.strip_suffix("_bucket").or_else(|| name.strip_suffix("_count")).unwrap_or(name);
        assert!(documented.contains(&format!("`{metric}`")), "{name} in rules.yaml is not a metric of docs/metrics.md");
        metrics += 1;
    }
    assert!(metrics >= 8, "only {metrics} metrics were found in rules.yaml");
}
