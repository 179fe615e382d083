#!/usr/bin/env bash
# Builds the Debian package; prints its path. Takes cargo-deb's flags, such as `--profile dev` for a fast build.
# Installs cargo-deb by cargo where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo-deb >/dev/null || cargo install --locked cargo-deb >&2
cargo deb -p pilotlight "$@"
