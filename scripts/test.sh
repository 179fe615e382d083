#!/usr/bin/env bash
# Installs what the tests need where it is missing, says what it does, and runs every test.
#   - a C compiler (build-essential), for the TLS library
#   - Rust 1.95 or later, by rustup, where there is no cargo
#   - etcd (Debian's etcd-server), for the store's contract and the stories with separate processes;
#     its service is not started, each test starts an etcd of its own on loopback and ends it
#   - promtool (Debian's prometheus), for the story of metrics; the service is not started
#   - `ip` (Debian's iproute2), for README's walks, which run in network namespaces of their own
#   - Python 3.11 or later with venv (Debian's python3, python3-venv), where `python3 -m venv` does not work:
#     one story installs other people's clients from PyPI, into target/clients-venv
#   - a Docker Engine (Debian's docker.io), for the conformance suite of the container runtime; a running one
#     is used, one that is started here is stopped again. Where none can be started, that part says so and is left out, unless
#     PILOTLIGHT_REQUIRE_DOCKER is set
#   - a registry of images (Debian's docker-registry), for the stories of pulls; its service is not started, each test
#     starts one of its own on loopback and ends it
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }
root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }

# What is made here is taken away again.
policy=
dockerd_pid=
clean_up() {
    [ -z "$policy" ] || root rm -f "$policy"
    [ -z "$dockerd_pid" ] || root kill "$dockerd_pid" || true
}
trap clean_up EXIT

packages=()
command -v cc >/dev/null || packages+=(build-essential)
command -v etcd >/dev/null || packages+=(etcd-server)
command -v promtool >/dev/null || packages+=(prometheus)
command -v dockerd >/dev/null || command -v docker >/dev/null || packages+=(docker.io)
command -v docker-registry >/dev/null || packages+=(docker-registry)
command -v ip >/dev/null || packages+=(iproute2)
# Debian's python3 has venv without what it needs, ensurepip, unless python3-venv is there.
python3 -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || packages+=(python3 python3-venv)
command -v cargo >/dev/null || [ -x "$HOME/.cargo/bin/cargo" ] || packages+=(curl ca-certificates)
if [ ${#packages[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || { echo "install these first: ${packages[*]}" >&2; exit 1; }
    say "Installing ${packages[*]}"
    root apt-get update -q
    # A policy that starts no services: the tests start their own.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' | root tee "$policy" >/dev/null
        root chmod +x "$policy"
    fi
    root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
fi
if ! command -v cargo >/dev/null; then
    if [ ! -x "$HOME/.cargo/bin/cargo" ]; then
        say "Installing Rust by rustup"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy,rustfmt
    fi
    export PATH="$HOME/.cargo/bin:$PATH"
fi

if ! docker version >/dev/null 2>&1 && command -v dockerd >/dev/null; then
    say "Starting dockerd"
    dockerd_pid=$(root sh -c 'nohup dockerd >/tmp/pilotlight-dockerd.log 2>&1 & echo $!')
    for _ in $(seq 60); do docker version >/dev/null 2>&1 && break; sleep 0.5; done
fi
docker version >/dev/null 2>&1 || say "No Docker Engine answers: tests of containers are left out"

say "Building"
cargo build --workspace --all-targets
say "Testing"
# The stories run the binary that was just built, rather than each building it once more.
PILOTLIGHT_TEST_BINARY="$(realpath "${CARGO_TARGET_DIR:-target}")/debug/pilotlight" cargo test --workspace --no-fail-fast
say "Testing the locks of the slots under many interleavings"
cargo test -p pilotlight-agent --features shuttle --lib shuttle
