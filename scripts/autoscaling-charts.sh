#!/usr/bin/env bash
# Makes the pictures of docs/autoscaling.md: `scripts/autoscaling-charts.sh [TRACE.csv]`. The trace is Azure's
# LLM inference trace 2023, code (AzurePublicDataset, CC-BY-4.0); without it that picture is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
trace=${1:-../shared/data/azure-llm-2023-code.csv}

cargo build --bin pilotlight
pilotlight="${CARGO_TARGET_DIR:-target}/debug/pilotlight"
gpu=autoscaling.knative.dev/class=gpu.autoscaling.pilotlight.dev

draw() {
    local name=$1
    shift
    echo "==> docs/autoscaling/$name.svg"
    "$pilotlight" simulate "$@" --service deploy/examples/llm.yaml --load-time 60s \
        --vary "$gpu" --vary pilotlight.dev/prewarm=auto --chart "docs/autoscaling/$name.svg" | head -n 6
}

mkdir -p docs/autoscaling
draw step --pattern step
draw spike --pattern spike
draw sine --pattern sine
if [ -f "$trace" ]; then
    draw azure --trace "$trace"
else
    echo "==> no trace at $trace; docs/autoscaling/azure.svg stays as it is"
fi
