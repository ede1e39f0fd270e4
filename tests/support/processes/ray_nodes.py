"""A Ray cluster on this machine whose nodes come and go: a program that tests start and write lines of JSON to.

``{"add": GPUS}`` answers the number of a new node, ``{"lose": NUMBER}`` kills one at once; the end of standard input
ends the cluster. The first line that it prints is the cluster's address. Ray gives a node half a minute to start: on a
busy machine that takes several attempts, and after the last one it ends with the status ``TOO_BUSY``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psutil

OBJECT_STORE_BYTES = 80_000_000
ATTEMPTS = 6
TOO_BUSY = 75


def main() -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What Ray prints is no answer.

    def say(value: object) -> None:
        said.write(json.dumps(value) + "\n")
        said.flush()

    from ray.cluster_utils import Cluster

    cluster = Cluster()
    started(cluster, num_cpus=1, num_gpus=0, include_dashboard=False, dashboard_port=0)
    say(cluster.address)
    nodes: list[Any] = []
    for line in sys.stdin:
        wanted = json.loads(line)
        if "add" in wanted:
            nodes.append(started(cluster, num_cpus=4, num_gpus=wanted["add"]))
            say(len(nodes) - 1)
        else:
            cluster.remove_node(nodes[wanted["lose"]], allow_graceful=False)
            say(None)
    cluster.shutdown()


def started(cluster: Any, **wanted: Any) -> Any:
    for _ in range(ATTEMPTS):
        before = _below()
        try:
            # Whether it has joined is seen by what runs there.
            return cluster.add_node(wait=False, object_store_memory=OBJECT_STORE_BYTES, **wanted)
        except Exception as error:
            print(f"a node did not start: {error}")
            for process in _below() - before:  # It must not join later, beside the next one.
                process.kill()
    sys.exit(TOO_BUSY)


def _below() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


if __name__ == "__main__":
    main()
