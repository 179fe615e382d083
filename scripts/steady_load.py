#!/usr/bin/env python3
"""Sends predictions at a steady rate through several nodes in turn, a connection each, until SIGINT; writes what became of them."""

import argparse
import collections
import http.client
import json
import signal
import threading
import time

BODY = json.dumps({"instances": [[6.8, 2.8, 4.8, 1.4]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", required=True, help="addresses, separated by commas")
    parser.add_argument("--host", required=True, help="the service's host")
    parser.add_argument("--rate", type=float, default=50, help="requests per second")
    parser.add_argument("--report", required=True, help="file for the outcome, JSON")
    args = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopping.set())
    lock, outcome = threading.Lock(), collections.Counter()

    def ask(node: str) -> None:
        try:
            connection = http.client.HTTPConnection(node, 8080, timeout=60)
            connection.request("POST", "/v1/models/iris:predict", BODY, {"Host": args.host})
            response = connection.getresponse()
            text = response.read()
            result = "answered" if response.status == 200 else f"{response.status} {text[:200]!r}"
            connection.close()
        except Exception as error:  # Whatever it is, it is counted.
            result = f"{time.strftime('%H:%M:%S')} {node}: {error!r}"
        with lock:
            outcome[result] += 1

    nodes, threads, sent, began = args.nodes.split(","), [], 0, time.monotonic()
    while not stopping.wait(max(0.0, began + sent / args.rate - time.monotonic())):
        thread = threading.Thread(target=ask, args=(nodes[sent % len(nodes)],))
        thread.start()
        threads = [other for other in threads if other.is_alive()] + [thread]
        sent += 1
    for thread in threads:
        thread.join()
    answered = outcome.pop("answered", 0)
    with open(args.report, "w") as report:
        json.dump({"sent": sent, "answered": answered, "failed": dict(outcome)}, report, indent=2)


main()
