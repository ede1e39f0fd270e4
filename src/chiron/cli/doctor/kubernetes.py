"""Whether the API servers of a config answer, have its workloads, and which ChironModels a gateway would accept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron.cli.doctor.checks import FAIL, WARN, Check, check

if TYPE_CHECKING:
    from chiron.fleet.kubernetes.source import KubernetesSource
    from chiron.gateway.settings import KindSettings, KubernetesModelsSettings, ServeConfig

RIGHTS = "the service account needs the rights of the chart's Role (docs/kubernetes.md)"


def kubernetes_checks(config: ServeConfig, directory: Path) -> Iterator[Check]:
    """``directory``: of the config file."""
    from chiron.fleet.kubernetes.source import KubernetesSource

    if config.kubernetes is not None:
        found, more = _models(config, config.kubernetes, directory)
        yield from found
    else:
        more = []
    kinds = [kind for model in config.models for kind in model.kinds]
    for kind in (*kinds, *more):
        if isinstance(kind.source, KubernetesSource):
            yield _workload(kind.source)


def _models(
    config: ServeConfig, settings: KubernetesModelsSettings, directory: Path
) -> tuple[list[Check], list[KindSettings]]:
    """And the kinds of those that would be accepted."""
    from chiron.config.chiron_models import ResourceReader
    from chiron.fleet.kubernetes.access import AccessError
    from chiron.fleet.kubernetes.client import KubernetesError
    from chiron.gateway.chiron_models.follower import access_of
    from chiron.gateway.chiron_models.objects import path_of, read_resource

    what = "ChironModels"
    try:
        _, namespace = access_of(settings)
        page = asyncio.run(_get(settings.kubeconfig, settings.context, path_of(namespace)))
        items = page.get("items")
        resources = [read_resource(item) for item in items] if isinstance(items, list) else []
    except (AccessError, KubernetesError, ValueError) as error:
        hint = (
            "install their definition: kubectl apply -f chironmodels.yaml" if str(error).startswith("404") else RIGHTS
        )
        return [check(what, str(error), FAIL, hint)], []
    reading = ResourceReader(config.text, directory=directory).read(resources)
    names = ", ".join(each.name for each in reading.accepted) or "none"
    found = [
        check(what, f"of namespace {namespace}: {names}"),
        *(
            check(f"ChironModel {each.name}", reading.refused[each.uid], WARN, "correct its spec")
            for each in resources
            if each.uid in reading.refused
        ),
    ]
    own = {model.name for model in config.models}
    return found, [kind for model in reading.config.models if model.name not in own for kind in model.kinds]


def _workload(source: KubernetesSource) -> Check:
    from chiron.fleet.kubernetes.access import AccessError, find_access
    from chiron.fleet.kubernetes.client import KubernetesError
    from chiron.fleet.kubernetes.source import CONSENT, CONSENTS

    what = f"{source.row.kind} {source.name}"
    try:
        access = find_access(os.environ, source.kubeconfig, source.context)
        path = f"{source.row.api}/namespaces/{source.namespace or access.namespace}/{source.row.plural}/{source.name}"
        scale = asyncio.run(_get(source.kubeconfig, source.context, f"{path}/scale"))
        itself = asyncio.run(_get(source.kubeconfig, source.context, path)) if source.opt_in else {}
    except (AccessError, KubernetesError) as error:
        hint = f"create it, or correct its name and namespace: {source.name}" if "404" in str(error) else RIGHTS
        return check(what, str(error), FAIL, hint)
    labels = (itself.get("metadata") or {}).get("labels") or {}
    if source.opt_in and labels.get(CONSENT) != CONSENTS:
        how = f"kubectl label {source.workload} {source.name} {CONSENT}={CONSENTS}"
        return check(what, f"no label {CONSENT}: a ChironModel may not use it", FAIL, how)
    wanted, there = (_replicas(scale.get(part)) for part in ("spec", "status"))
    return check(what, f"{wanted} replicas asked for, {there} there; {source.scaler} sets the number")


async def _get(kubeconfig: str, context: str, path: str) -> dict[str, Any]:
    from chiron.fleet.kubernetes.access import find_access
    from chiron.fleet.kubernetes.client import Client

    client = Client(find_access(os.environ, kubeconfig, context))
    try:
        return await client.get(path)
    finally:
        await client.close()


def _replicas(part: object) -> int:
    found = part.get("replicas", 0) if isinstance(part, Mapping) else 0
    return found if isinstance(found, int) else 0
