#!/usr/bin/env bash
# Follows docs/install.md word for word on fresh systems, and upgrades them under load without a failed request.
#
# The systems are containers with Debian bookworm and systemd, made by debootstrap (installed by apt where it is missing).
# It needs a Docker Engine, root, and a network from which Debian packages come. The packages are built with the profile
# of `PILOTLIGHT_DEB_FLAGS` (default `--profile dev --no-strip`). Everything that it makes is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
image=pilotlight-install-test
network=pilotlight-install-test
machines=(coordinator node-1 node-2 node-3)
nodes=(node-1 node-2 node-3)
say() { printf '==> %s\n' "$*"; }
clean_up() {
    [ -z "${load:-}" ] || kill "$load" 2>/dev/null || true
    for machine in "${machines[@]}"; do docker rm -f "it-$machine" >/dev/null 2>&1 || true; done
    docker network rm "$network" >/dev/null 2>&1 || true
    docker rmi "$image" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean_up EXIT

# The n-th block of the guide that begins with the comment `# on MACHINE`, with this run's names.
block() {
    awk -v on="# on $1" -v n="$2" '/^```/ { inside = !inside; first = inside; next }
        inside && first { first = 0; take = ($0 == on) && ++seen == n; next }
        inside && take { print }' docs/install.md |
        sed -e "s/coordinator\.example/coordinator/g" -e "s/TOKEN/${TOKEN:-}/g" -e "s/NODE/${NODE:-}/g"
}
# Runs it on a machine.
follow() {
    local machine=$1 on=$2 n=$3 text
    text=$(block "$on" "$n")
    [ -n "$text" ] || { echo "docs/install.md has no block $n on $on" >&2; exit 1; }
    say "$machine: $(head -1 <<<"$text") …"
    docker exec -i -e PILOTLIGHT_SERVER=https://coordinator:7443 \
        -e PILOTLIGHT_CREDENTIALS=/var/lib/pilotlight/coordinator/operator -w /root "it-$machine" bash -euo pipefail -c "$text"
}
operator() {
    docker exec -e PILOTLIGHT_SERVER=https://coordinator:7443 \
        -e PILOTLIGHT_CREDENTIALS=/var/lib/pilotlight/coordinator/operator it-coordinator pilotlight "$@"
}
# Waits until a command succeeds.
until_true() {
    local what=$1
    shift
    for _ in $(seq 240); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done
    echo "gave up waiting until $what" >&2
    exit 1
}
is_ready() { operator get nodes | grep -qE "^$1 +Ready"; }
has_version() { operator get nodes -o json | jq -e --arg n "$1" --arg v "$2" '.items[] | select(.name == $n) | .agentVersion == $v'; }
address() { docker inspect -f '{{(index .NetworkSettings.Networks "'"$network"'").IPAddress}}' "it-$1"; }

say "Building two versions of the package"
flags=${PILOTLIGHT_DEB_FLAGS:---profile dev --no-strip}
# shellcheck disable=SC2086
cp "$(scripts/build-deb.sh $flags --deb-version 0.1.0-1 | tail -1)" "$work/old.deb"
# shellcheck disable=SC2086
cp "$(scripts/build-deb.sh $flags --no-build --deb-version 0.1.0-2 | tail -1)" "$work/new.deb"

say "Making fresh systems"
command -v debootstrap >/dev/null || apt-get install -q -y --no-install-recommends debootstrap >/dev/null
root=${PILOTLIGHT_DEBIAN_ROOT:-$work/root}
[ -d "$root/usr" ] || debootstrap --variant=minbase \
    --include=systemd,systemd-sysv,dbus,iproute2,curl,ca-certificates,procps bookworm "$root" >/dev/null
tar -C "$root" -c . | docker import - "$image" >/dev/null
docker network create "$network" >/dev/null
for machine in "${machines[@]}"; do
    docker run -d --name "it-$machine" --hostname "$machine" --network "$network" --network-alias "$machine" \
        --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE --security-opt seccomp=unconfined \
        --security-opt apparmor=unconfined --tmpfs /run --tmpfs /tmp --tmpfs /run/lock \
        -v /sys/fs/cgroup:/sys/fs/cgroup:rw "$image" /lib/systemd/systemd >/dev/null
    docker cp -q "$work/old.deb" "it-$machine:/root/pilotlight.deb"
    # A minimal system has no sudo; root needs none.
    docker exec "it-$machine" sh -c 'printf "#!/bin/sh\nexec \"\$@\"\n" >/usr/local/bin/sudo; chmod +x /usr/local/bin/sudo'
    until_true "$machine has booted" docker exec "it-$machine" systemctl is-system-running
done

follow coordinator "the coordinator" 1
until_true "the coordinator leads" operator get nodes
follow coordinator "the coordinator" 2
for node in "${nodes[@]}"; do
    TOKEN=$(follow coordinator "the coordinator" 3 | tail -1)
    follow "$node" "each node" 1
    until_true "$node is ready" is_ready "$node"
done
# There is one replica: two of the nodes pass the request on.
for node in "${nodes[@]}"; do
    NODE=$(address "$node") follow coordinator "the coordinator" 4 | grep predictions
done

say "A canary, promoted; a node drained and opened again"
docker exec it-coordinator sed -n p /usr/share/pilotlight/examples/iris.yaml >"$work/iris.yaml"
sed -e 's/minReplicas: 0/minReplicas: 2\n    canaryTrafficPercent: 20/' -e 's/image: pilotlight:dev/image: pilotlight:next/' \
    "$work/iris.yaml" >"$work/canary.yaml"
docker cp -q "$work/canary.yaml" it-coordinator:/root/canary.yaml
operator apply -f /root/canary.yaml
until_true "the canary takes its share" sh -c "$(declare -f operator); operator get revisions | grep -E '00002.* 20'"
operator get revisions
operator wait --for=condition=Ready isvc/iris --timeout=60s
operator rollout promote iris
operator wait --for=condition=Ready isvc/iris --timeout=60s
operator node drain node-3
operator node uncordon node-3

say "Upgrading one machine after the other under load"
addresses=$(for node in "${nodes[@]}"; do address "$node"; done | paste -sd,)
python3 scripts/steady_load.py --nodes "$addresses" --host iris.default.localhost --rate 50 --report "$work/load.json" &
load=$!
sleep 5
pids() { operator get replicas -o json | jq -c '[.items[] | {name, pid}]'; }
for machine in "${machines[@]}"; do
    before=$(docker exec "it-$machine" sh -c 'systemctl show -p MainPID --value pilotlight-coordinator pilotlight-agent | paste -sd,')
    docker cp -q "$work/new.deb" "it-$machine:/root/pilotlight.deb"
    follow "$machine" "each machine" 1 >/dev/null
    after=$(docker exec "it-$machine" sh -c 'systemctl show -p MainPID --value pilotlight-coordinator pilotlight-agent | paste -sd,')
    [ "$before" != "$after" ] || { echo "$machine: the package has not restarted the service" >&2; exit 1; }
    for node in "${nodes[@]}"; do until_true "$node is ready" is_ready "$node"; done
    sleep 2
done
kill -INT "$load"
wait "$load" || true
load=
cat "$work/load.json"
if ! jq -e '.sent > 500 and .sent == .answered' "$work/load.json" >/dev/null; then
    for node in "${nodes[@]}"; do
        docker exec "it-$node" journalctl -u pilotlight-agent -u pilotlight-gateway.socket --no-pager -o short-precise | tail -40
    done
    echo "requests failed during the upgrade" >&2
    exit 1
fi

say "A snapshot, and back to it"
follow coordinator "the coordinator" 5
operator delete isvc iris
docker exec it-coordinator sh -euc '
    systemctl stop pilotlight-coordinator
    mv /var/lib/pilotlight/coordinator/state.redb /root/state.before
    pilotlight snapshot restore /root/cell.snapshot --data-dir /var/lib/pilotlight/coordinator
    chown -R pilotlight: /var/lib/pilotlight/coordinator
    systemctl start pilotlight-coordinator'
until_true "the coordinator leads" operator get nodes
operator get isvc iris
for node in "${nodes[@]}"; do until_true "$node is ready" is_ready "$node"; done
curl -sf -H 'Host: iris.default.localhost' "http://$(address node-2):8080/v1/models/iris:predict" \
    -d '{"instances": [[6.8, 2.8, 4.8, 1.4]]}'
say "All of docs/install.md works"
