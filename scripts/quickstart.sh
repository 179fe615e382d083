#!/usr/bin/env bash
# Builds Pilotlight, starts `pilotlight dev`, applies the iris example, asks it for two predictions while
# it is at zero replicas, watches it go back to zero, where it sleeps, and wakes it. Needs Rust, a C compiler and curl; leaves
# nothing running. State lies in a temporary folder, ports are given by variables.
set -euo pipefail
cd "$(dirname "$0")/.."

ingress=${PILOTLIGHT_QUICKSTART_INGRESS_PORT:-8080}
grpc=${PILOTLIGHT_QUICKSTART_GRPC_PORT:-7443}
http=${PILOTLIGHT_QUICKSTART_HTTP_PORT:-7480}

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }

say "Building (the first time takes some minutes)"
cargo build --bin pilotlight
pilotlight="${CARGO_TARGET_DIR:-target}/debug/pilotlight"
data=$(mktemp -d)
export PILOTLIGHT_SERVER="http://127.0.0.1:$grpc"

say "Starting pilotlight dev; its log is $data/dev.log"
"$pilotlight" dev --data-dir "$data/state" --listen "127.0.0.1:$grpc" --listen-http "127.0.0.1:$http" \
    --listen-ingress "127.0.0.1:$ingress" >"$data/dev.log" 2>&1 &
dev=$!
stop() {
    kill "$dev" 2>/dev/null || true
    wait "$dev" 2>/dev/null || true
}
trap stop EXIT
until "$pilotlight" get nodes 2>/dev/null | grep -q Ready; do
    kill -0 "$dev" 2>/dev/null || { cat "$data/dev.log"; exit 1; }
    sleep 0.2
done

say "pilotlight apply -f deploy/examples/iris.yaml"
"$pilotlight" apply -f deploy/examples/iris.yaml
"$pilotlight" get

url="http://127.0.0.1:$ingress/v1/models/iris:predict"
flowers='{"instances": [[6.8, 2.8, 4.8, 1.4], [5.1, 3.5, 1.4, 0.2]]}'
say "curl -H 'Host: iris.default.localhost' $url -d '$flowers'"
answer=$(curl --silent --show-error --fail -H 'Host: iris.default.localhost' "$url" -d "$flowers")
echo "$answer"
[ "$answer" = '{"predictions":[1,0]}' ] || { echo "expected classes 1 (versicolor) and 0 (setosa)" >&2; exit 1; }
"$pilotlight" get
"$pilotlight" get replicas

say "Nobody asks any more; it goes back to zero, and its last replica sleeps"
until "$pilotlight" get | grep -q ' 0/0 '; do sleep 1; done
until "$pilotlight" get replicas | grep -q Asleep; do sleep 0.2; done
"$pilotlight" get
"$pilotlight" get replicas

say "The next request wakes it"
answer=$(curl --silent --show-error --fail -H 'Host: iris.default.localhost' "$url" -d "$flowers")
echo "$answer"
"$pilotlight" get replicas

say "Why: pilotlight describe isvc iris"
"$pilotlight" describe isvc iris
say "It works. Now run it yourself: $pilotlight dev"
