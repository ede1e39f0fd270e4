"""A gateway that leads no more, and has not noticed yet, changes nothing in the cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import ApiError, Client
from kubernetes_site import DEPLOYMENTS, PODS, cluster


class OverError(Exception):
    """Stands for the end of the process."""


def test_what_changes_something_looks_at_the_end_of_the_lease_first(tmp_path: Path) -> None:
    def over() -> None:
        raise OverError

    async def main() -> None:
        async with cluster("fake", tmp_path, nodes=0) as here:
            client = Client(from_kubeconfig(here.kubeconfig), changes=over)
            assert (await client.get(PODS))["items"] == []
            body = {"metadata": {"name": "engine"}, "spec": {"replicas": 3}}
            for change in (client.put, client.post, client.patch, client.delete):
                with pytest.raises(OverError):
                    await change(f"{DEPLOYMENTS}/engine", body)
            with pytest.raises(ApiError):
                await client.get(f"{DEPLOYMENTS}/engine")
            await client.close()

    asyncio.run(main())
