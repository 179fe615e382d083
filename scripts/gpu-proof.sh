#!/usr/bin/env bash
# Proves on a real GPU host, without a network and in under ten minutes, what tests without a GPU cannot: the inventory
# against nvidia-smi, and a PyTorch model server as a process replica from zero, asleep, awake, taking turns and evicted,
# with times beside the same server started by hand. Prints tables; --record appends them to docs/measured/gpu.md.
#
# Needs: an NVIDIA driver with nvidia-smi, Python 3.9 with PyTorch (PYTHON names it), and a pilotlight binary
# (PILOTLIGHT names it; default: target/release or target/debug). No other process may use the GPUs.
#
# Exit status: 0 all holds, 1 something does not, 2 the host cannot run it, such as one without a GPU.
#
#   scripts/gpu-proof.sh [--gib 8] [--record] [--keep]
#   scripts/gpu-proof.sh --rehearse     on any machine with PyTorch: CPU and a simulated GPU, to test the script itself;
#                                       proves nothing about GPUs, and records nothing
set -euo pipefail
cd "$(dirname "$0")/.."

cannot() { printf 'gpu-proof: %s\n' "$*" >&2; exit 2; }

rehearse=
for argument in "$@"; do [ "$argument" != --rehearse ] || rehearse=1; done

if [ -z "$rehearse" ]; then
    command -v nvidia-smi >/dev/null || cannot "no GPU here: nvidia-smi is not installed"
    found=$(nvidia-smi -L 2>&1) || cannot "no GPU here: nvidia-smi says: $found"
    case $found in *"GPU "*) ;; *) cannot "no GPU here: nvidia-smi -L lists none: $found" ;; esac
fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || cannot "$python is not installed; set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || cannot "$python is too old; Python 3.9 or later is needed"
"$python" -c 'import torch' 2>/dev/null || cannot "$python has no PyTorch; set PYTHON to one that has"
if [ -z "$rehearse" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
        || cannot "PyTorch of $python sees no GPU; a build with CUDA that suits the driver is needed"
fi

pilotlight=${PILOTLIGHT:-}
for binary in "${CARGO_TARGET_DIR:-target}"/{release,debug}/pilotlight; do
    [ -n "$pilotlight" ] || [ ! -x "$binary" ] || pilotlight=$binary
done
[ -n "$pilotlight" ] || cannot "no pilotlight binary; build one by: cargo build --release --bin pilotlight"
[ -x "$pilotlight" ] || cannot "PILOTLIGHT=$pilotlight is not a program"

exec timeout --kill-after=20 590 "$python" tests/gpu/proof.py --pilotlight "$(realpath "$pilotlight")" "$@"
