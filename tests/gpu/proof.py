#!/usr/bin/env python3
"""What scripts/gpu-proof.sh runs, once it has found all it needs. Standard library only."""

import argparse
import datetime
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "tests/gpu/server.py"
RECORD = ROOT / "docs/measured/gpu.md"
PROMPT = {"prompt": "The GPU", "max_tokens": 16, "temperature": 0}
MIB = 2**20
# Longest wait for one step, seconds. The whole script has its own limit.
PATIENCE = 180

ANNOTATIONS = {
    "autoscaling.knative.dev/initial-scale": "0",
    "autoscaling.knative.dev/window": "6s",
    "autoscaling.knative.dev/scale-down-delay": "0s",
    "autoscaling.knative.dev/scale-to-zero-pod-retention-period": "0s",
}
SLEEP = {
    "pilotlight.dev/sleep-path": "/sleep?level=1",
    "pilotlight.dev/wake-path": "/wake_up",
    "pilotlight.dev/is-sleeping-path": "/is_sleeping",
}


class Failed(Exception):
    """A claim does not hold."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, ask, patience=PATIENCE):
    """Asks until there is an answer that is not None or False."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        answer = ask()
        if answer is not None and answer is not False:
            return answer
        time.sleep(0.05)
    raise Failed(f"gave up after {patience} s waiting until {what}")


def request(port, method, path, body=None, host="localhost"):
    """Status and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Host": host, "Content-Type": "application/json"}
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def timed(call):
    began = time.monotonic()
    result = call()
    return time.monotonic() - began, result


class Gpus:
    """The GPUs as nvidia-smi sees them; none where it is a rehearsal."""

    def __init__(self, rehearse):
        self.rehearse = rehearse
        self.log = None if rehearse else xml.etree.ElementTree.fromstring(self.smi("-q", "-x"))

    def smi(self, *arguments):
        return subprocess.run(["nvidia-smi", *arguments], check=True, capture_output=True, text=True, timeout=60).stdout

    def count(self):
        return 1 if self.rehearse else len(self.log.findall("gpu"))

    def used(self):
        """Bytes in use on all GPUs together, by anyone; None in a rehearsal."""
        return None if self.rehearse else sum(self.used_by_gpu())

    def used_by_gpu(self):
        """Bytes in use on each GPU, by anyone."""
        if self.rehearse:
            return []
        lines = self.smi("--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
        return [int(line) * MIB for line in lines]

    def divided(self):
        """Indices of GPUs in MIG mode."""
        gpus = [] if self.rehearse else self.log.findall("gpu")
        return [index for index, gpu in enumerate(gpus) if gpu.findtext("mig_mode/current_mig") == "Enabled"]

    def describe(self):
        if self.rehearse:
            return "rehearsal on the CPU with a simulated GPU"
        names = [gpu.findtext("product_name") for gpu in self.log.findall("gpu")]
        return f"{len(names)} x {names[0]}, driver {self.log.findtext('driver_version')}"


class ByHand:
    """The model server, started without Pilotlight."""

    def __init__(self, options, log):
        self.port = free_port()
        command = [sys.executable, str(SERVER), *options, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def is_healthy(self):
        if self.process.poll() is not None:
            raise Failed(f"the server started by hand ended with status {self.process.returncode}; see by-hand.log")
        try:
            return request(self.port, "GET", "/health")[0] == 200
        except OSError:
            return False

    def complete(self):
        return completion(*request(self.port, "POST", "/v1/completions", PROMPT))

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def completion(status, body):
    if status != 200:
        raise Failed(f"a completion was answered with {status}: {body[:300]}")
    return json.loads(body)["choices"][0]["text"]


class Dev:
    """`pilotlight dev`, which ends with its replicas."""

    def __init__(self, options, directory):
        self.pilotlight, self.rehearse = options.pilotlight, options.rehearse
        grpc, status, self.ingress = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{grpc}"
        command = [
            self.pilotlight, "dev", "--runtime", "process", "--data-dir", str(directory / "data"),
            "--listen", f"127.0.0.1:{grpc}", "--listen-http", f"127.0.0.1:{status}",
            "--listen-ingress", f"127.0.0.1:{self.ingress}",
        ]
        if options.rehearse:
            command += ["--simulate-gpus", "1"]
        self.log = directory / "dev.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for("pilotlight dev has a node", self.has_node, 60)

    def run(self, *arguments, text=None):
        command = [self.pilotlight, "--server", self.url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, input=text, timeout=60)

    def must(self, *arguments, text=None):
        done = self.run(*arguments, text=text)
        if done.returncode != 0:
            raise Failed(f"pilotlight {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def items(self, kind):
        if self.process.poll() is not None:
            raise Failed(f"pilotlight dev ended with status {self.process.returncode}; see dev.log")
        return json.loads(self.must("get", kind, "-o", "json")).get("items", [])

    def has_node(self):
        try:
            nodes = self.nodes()
        except Failed:
            # It does not answer yet.
            return self.process.poll() is not None
        return bool(nodes) and nodes[0]["state"] == "Ready"

    def nodes(self):
        return self.items("nodes")

    def replicas(self, service):
        return [replica for replica in self.items("replicas") if replica["service"] == service]

    def is_in(self, service, phase):
        replicas = self.replicas(service)
        return len(replicas) == 1 and replicas[0]["phase"] == phase and replicas[0]

    def apply(self, manifest, directory):
        path = directory / f"{manifest['metadata']['name']}.json"
        path.write_text(json.dumps(manifest))
        self.must("apply", "-f", str(path))

    def complete(self, service):
        host = f"{service}.default.localhost"
        return completion(*request(self.ingress, "POST", "/v1/completions", PROMPT, host))

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def manifest(name, options, gpus, sleeps):
    annotations = {**ANNOTATIONS, **(SLEEP if sleeps else {})}
    container = {
        "name": "kserve-container",
        "image": "none",
        "command": [sys.executable, str(SERVER), *options, "--name", name],
        "ports": [{"containerPort": 8080, "name": "http1"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8080}, "timeoutSeconds": 5},
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"predictor": {"minReplicas": 0, "maxReplicas": 1, "timeout": PATIENCE, "containers": [container]}},
    }


class Proof:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.gpus = Gpus(options.rehearse)
        self.claims = []
        # Seconds by tier: by hand, by Pilotlight.
        self.by_hand, self.by_pilotlight = {}, {}
        self.server = ["--seed", "7", "--gib", str(options.gib)]
        self.server += ["--device", "cpu", "--width", "256"] if options.rehearse else ["--device", "cuda"]
        self.weight_bytes = 0

    def claim(self, name, holds, detail):
        """Notes whether a claim holds; None: it was not checked."""
        word = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}[holds]
        print(f"{word:14} {name}: {detail}", flush=True)
        self.claims.append((name, word, detail))

    def check_memory(self, name, used, at_most, at_least=0):
        if used is None:
            return self.claim(name, None, "there is no GPU in a rehearsal")
        detail = f"{used / 2**30:.2f} GiB in use, expected {at_least / 2**30:.2f} to {at_most / 2**30:.2f}"
        self.claim(name, at_least <= used <= at_most, detail)

    def run(self):
        self.idle = self.gpus.used()
        # Pilotlight gives nobody a GPU of which others hold more.
        busy = [index for index, used in enumerate(self.gpus.used_by_gpu()) if used > 512 * MIB]
        if busy:
            raise Failed(f"memory of GPUs {busy} is in use by others; end them first")
        divided = self.gpus.divided()
        if divided:
            raise Failed(f"GPUs {divided} are in MIG mode; this proof needs whole GPUs")
        text = self.measure_by_hand()
        self.dev = Dev(self.options, self.directory)
        try:
            self.check_inventory()
            self.check_tiers(text)
            self.check_turns(text)
            self.check_eviction(text)
        finally:
            self.dev.stop()
        settled = wait_for("GPU memory is free", self.is_idle, 60) if self.idle is not None else None
        self.claim("nothing is left behind", settled, "GPU memory after pilotlight dev has ended")

    def is_idle(self):
        return self.gpus.used() <= self.idle + 512 * MIB

    def measure_by_hand(self):
        with (self.directory / "by-hand.log").open("w") as log:
            began = time.monotonic()
            server = ByHand(self.server, log)
            try:
                wait_for("the server started by hand is healthy", server.is_healthy)
                text = server.complete()
                self.by_hand["from zero"] = time.monotonic() - began
                self.by_hand["serving"], again = min(timed(server.complete) for _ in range(5))
                self.claim("the server is deterministic", text == again, "two completions at temperature 0")
                self.weight_bytes = json.loads(request(server.port, "GET", "/health")[1])["weight_bytes"]
                awake = self.gpus.used()
                request(server.port, "POST", "/sleep?level=1")
                asleep = self.gpus.used()
                if awake is not None:
                    freed = awake - asleep
                    detail = f"{freed / 2**30:.2f} GiB freed of {self.weight_bytes / 2**30:.2f} GiB of weights"
                    self.claim("sleep by hand frees the weights", freed > 0.9 * self.weight_bytes, detail)
                def wake():
                    request(server.port, "POST", "/wake_up")
                    return server.complete()
                self.by_hand["asleep"], woken = timed(wake)
                self.claim("the text is the same after sleep by hand", woken == text, repr(text[:16]))
            finally:
                server.stop()
        if self.idle is not None:
            wait_for("the GPU is idle again", self.is_idle, 60)
        return text

    def check_inventory(self):
        node = self.dev.nodes()[0]
        if self.options.rehearse:
            return self.claim("inventory equals nvidia-smi -q -x", None, f"{len(node['gpus'])} simulated GPU")
        log, labels = self.gpus.log, node["labels"]
        wrong = []

        def compare(what, ours, theirs):
            if ours != theirs:
                wrong.append(f"{what}: {ours!r}, nvidia-smi says {theirs!r}")

        compare("driver", labels.get("nvidia.com/cuda.driver-version.full"), log.findtext("driver_version"))
        compare("CUDA", labels.get("nvidia.com/cuda.runtime-version.full"), log.findtext("cuda_version"))
        theirs = log.findall("gpu")
        compare("number of GPUs", len(node["gpus"]), len(theirs))
        by_uuid = {gpu.findtext("uuid"): gpu for gpu in theirs}
        for gpu in node["gpus"]:
            their = by_uuid.get(gpu["uuid"])
            if their is None:
                wrong.append(f"GPU {gpu['index']}: nvidia-smi knows no {gpu['uuid']}")
                continue
            name = f"GPU {gpu['index']}"
            compare(f"{name} product", gpu["product"], their.findtext("product_name"))
            total = int(their.findtext("fb_memory_usage/total").split()[0])
            compare(f"{name} memory, MiB", gpu["memoryBytes"] // MIB, total)
            parts = len(their.findall("mig_devices/mig_device"))
            compare(f"{name} MIG devices", len(gpu["migDevices"]), parts)
        self.claim("inventory equals nvidia-smi -q -x", not wrong, "; ".join(wrong) or f"{len(theirs)} GPUs")
        health = wait_for("health is reported", lambda: all(g["health"] for g in self.dev.nodes()[0]["gpus"]) or None, 60)
        bad = [gpu["quarantine"] for gpu in self.dev.nodes()[0]["gpus"] if gpu["quarantine"]]
        unread = [gpu["health"]["unreadable"] for gpu in self.dev.nodes()[0]["gpus"] if gpu["health"]["unreadable"]]
        self.claim("health of all GPUs is read", health and not bad and not unread, f"{bad or unread or 'all readable'}")

    def check_tiers(self, text):
        self.dev.apply(manifest("model-a", self.server, self.gpus.count(), True), self.directory)
        self.by_pilotlight["from zero"], first = timed(lambda: self.dev.complete("model-a"))
        self.claim("from zero", first == text, "the same text as by hand")
        replica = self.dev.is_in("model-a", "Ready")
        self.by_pilotlight["serving"], _ = min(timed(lambda: self.dev.complete("model-a")) for _ in range(5))
        if not self.options.rehearse:
            measured = lambda: (self.dev.is_in("model-a", "Ready") or {}).get("gpuMemoryBytes") or None
            used = wait_for("the replica's GPU memory is measured", measured, 60)
            detail = f"{used / 2**30:.2f} GiB for {self.weight_bytes / 2**30:.2f} GiB of weights, pid {replica['pid']}"
            self.claim("GPU memory of the replica is measured", used > self.weight_bytes, detail)
        wait_for("model-a sleeps", lambda: self.dev.is_in("model-a", "Asleep"))
        at_most = None if self.idle is None else self.idle + max(2**30, self.weight_bytes // 4)
        self.check_memory("asleep, the weights are off the GPU (nvidia-smi)", self.gpus.used(), at_most)
        self.by_pilotlight["asleep"], woken = timed(lambda: self.dev.complete("model-a"))
        self.claim("awake again", woken == text, "the same text as before sleep")
        self.check_memory(
            "awake, the weights are on the GPU (nvidia-smi)", self.gpus.used(), 2**60, self.weight_bytes
        )

    def check_turns(self, text):
        self.dev.apply(manifest("model-b", self.server, self.gpus.count(), True), self.directory)
        took = []
        for turn in range(6):
            service = "model-b" if turn % 2 == 0 else "model-a"
            seconds, said = timed(lambda: self.dev.complete(service))
            if said != text:
                return self.claim("two models take turns on one GPU", False, f"{service} said {said[:16]!r} in turn {turn}")
            took.append(seconds)
            other = {"model-a": "model-b", "model-b": "model-a"}[service]
            phases = [replica["phase"] for replica in self.dev.replicas(other)]
            if phases != ["Asleep"]:
                return self.claim("two models take turns on one GPU", False, f"{other} is {phases} while {service} serves")
            self.check_quietly(turn)
        # The first turn of model-b is its start from zero.
        woken = took[1:]
        detail = f"{len(took)} turns; woken ones took {min(woken):.2f} to {max(woken):.2f} s"
        self.claim("two models take turns on one GPU", True, detail)
        self.by_pilotlight["asleep, another model serves"] = min(woken)

    def check_quietly(self, turn):
        used = self.gpus.used()
        if used is not None and used > self.idle + 1.5 * self.weight_bytes + 2 * 2**30:
            raise Failed(f"turn {turn}: {used / 2**30:.1f} GiB of GPU memory are in use: both models are on the GPU")

    def check_eviction(self, text):
        # Without endpoints for sleep it is paused, and keeps its GPU memory until somebody needs it.
        self.dev.apply(manifest("plain", self.server, self.gpus.count(), False), self.directory)
        said = self.dev.complete("plain")
        asleep = wait_for("plain is paused", lambda: self.dev.is_in("plain", "Asleep"))
        self.claim("a paused replica keeps its GPU memory", asleep["holdsGpuMemory"] and said == text, "as reported")
        self.check_memory("paused, the weights are on the GPU (nvidia-smi)", self.gpus.used(), 2**60, self.weight_bytes)
        seconds, said = timed(lambda: self.dev.complete("model-a"))
        gone = wait_for("plain is evicted", lambda: not self.dev.replicas("plain") or None, 60)
        evicted = "Preempted" in self.dev.must("events", "plain")
        self.claim("eviction", gone and evicted and said == text, f"model-a answered in {seconds:.2f} s")

    def tables(self):
        lines = [f"{self.gpus.describe()}; {self.weight_bytes / 2**30:.2f} GiB of weights; seconds to 16 tokens", ""]
        lines += ["| tier | by hand | Pilotlight | added |", "| --- | --- | --- | --- |"]
        for tier, ours in self.by_pilotlight.items():
            theirs = self.by_hand.get(tier)
            added = "" if theirs is None else f"{ours - theirs:+.3f}"
            lines.append(f"| {tier} | {'' if theirs is None else f'{theirs:.3f}'} | {ours:.3f} | {added} |")
        lines += ["", "| claim | | detail |", "| --- | --- | --- |"]
        lines += [f"| {name} | {word} | {detail} |" for name, word, detail in self.claims]
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pilotlight", required=True)
    parser.add_argument("--gib", type=float, help="size of the weights; default: 8, in a rehearsal 0.05")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--record", action="store_true", help="append the tables to docs/measured/gpu.md")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs")
    options = parser.parse_args()
    if options.gib is None:
        options.gib = 0.05 if options.rehearse else 8
    if options.record and options.rehearse:
        parser.error("--record: a rehearsal measures no GPU, and is not recorded")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    directory = pathlib.Path(tempfile.mkdtemp(prefix="gpu-proof-"))
    began = time.monotonic()
    try:
        proof = Proof(options, directory)
        try:
            proof.run()
        except (Failed, OSError, subprocess.SubprocessError) as error:
            proof.claim("the proof came to its end", False, str(error))
        tables = proof.tables()
        print(f"\n{tables}\n\n{time.monotonic() - began:.0f} s in total")
        failed = any(word == "DOES NOT HOLD" for _, word, _ in proof.claims)
        if options.record:
            day = datetime.date.today().isoformat()
            with RECORD.open("a") as record:
                record.write(f"\n## {day}, {'does not hold' if failed else 'holds'}\n\n{tables}\n")
        if failed:
            options.keep = True
            for log in sorted(directory.glob("*.log")):
                print(f"\n{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]), file=sys.stderr)
        return 1 if failed else 0
    finally:
        if options.keep:
            print(f"logs are in {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
