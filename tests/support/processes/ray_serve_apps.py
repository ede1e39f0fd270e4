"""Applications of a real Ray Serve on a cluster of this program: tests start it and read one line of JSON from it.

Two applications: ``inside``, whose deployments' replicas Chiron's policies set from inside Ray Serve's controller, and
``beside``, which an external scaler scales. Each request takes a second. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

from ray_nodes import ATTEMPTS, OBJECT_STORE_BYTES, TOO_BUSY

QUICK = {"target_ongoing": 2.0, "upscale_delay": 0.0, "downscale_delay": 20.0, "look_back": 2.0}
"""Of the policy ``ray-serve``: it goes down late, so that a machine that stalls stops no start."""
REQUEST_S = 1.0
POLICIES: dict[str, dict[str, Any]] = {
    # So long answers within so tight an SLO that a replica can run few requests at a time.
    "chiron": {"input_tokens": 4000, "output_tokens": 500, "itl_s": 0.015, "cold_start_s": 2.0},
    "ray-serve": {"settings": QUICK},
}


def main() -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What Ray prints is no answer.

    import ray
    from ray import serve

    dashboard, metrics, http = (_free_port() for _ in range(3))
    for _ in range(ATTEMPTS):
        try:
            ray.init(
                num_cpus=16,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=dashboard,
                _metrics_export_port=metrics,
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config={"metrics_report_interval_ms": 1000},
            )
            break
        except Exception as error:
            print(f"the cluster did not start: {error}")
            ray.shutdown()
    else:
        sys.exit(TOO_BUSY)
    serve.start(http_options={"host": "127.0.0.1", "port": http})

    class Model:
        async def __call__(self, request: Any) -> str:
            await asyncio.sleep(REQUEST_S)
            return "done"

    small = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}
    for policy, arguments in POLICIES.items():
        scaled = {
            "min_replicas": 1,
            "max_replicas": 4,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "look_back_period_s": 2,
            "metrics_interval_s": 0.5,
            "policy": {
                "policy_function": "chiron.ray:ServeAutoscaler",
                "policy_kwargs": {"policy": policy, **arguments},
            },
        }
        made = serve.deployment(Model, name="Model", autoscaling_config=scaled, **small)
        serve.run(made.bind(), name=policy, route_prefix=f"/{policy}")
    fixed = serve.deployment(Model, name="Model", num_replicas=1, **small)
    serve.run(fixed.bind(), name="beside", route_prefix="/beside", external_scaler_enabled=True)
    ports = {"http": http, "dashboard": dashboard, "metrics": metrics}
    said.write(json.dumps({name: f"http://127.0.0.1:{port}" for name, port in ports.items()}) + "\n")
    said.flush()
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
