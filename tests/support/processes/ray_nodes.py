"""A Ray cluster on this machine whose nodes come and go: a program that tests start and write lines of JSON to.

``{"add": GPUS}`` answers the number of a new node, ``{"lose": NUMBER}`` kills one at once; the end of standard input
ends the cluster. The first line that it prints is the cluster's address. A busy machine may need several attempts: Ray
gives a node half a minute.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

OBJECT_STORE_BYTES = 80_000_000
ATTEMPTS = 6


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
    for attempt in range(ATTEMPTS):
        try:
            return cluster.add_node(object_store_memory=OBJECT_STORE_BYTES, **wanted)
        except Exception:
            cluster.head_node = cluster.head_node if cluster.worker_nodes else None
            if attempt == ATTEMPTS - 1:
                raise
    return None


if __name__ == "__main__":
    main()
