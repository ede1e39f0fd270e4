"""Head and stage over TLS: both ends show a certificate of one authority; anything else is refused with the reason."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import pytest

from peer_certificates import Authority
from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged import stage as stage_process  # noqa: E402
from chiron.engines.staged.errors import StagedModelError  # noqa: E402
from chiron.engines.staged.wire import read_tls, tls_client, tls_server  # noqa: E402
from staged_site import StagedSite, staged_site, until  # noqa: E402

PROMPT = prompts(3, seed=0)[0]


def options(authority: Path, certificate: Path, key: Path) -> argparse.Namespace:
    return argparse.Namespace(tls_cert=certificate, tls_key=key, tls_ca=authority)


async def with_stage_over_tls(site: StagedSite, stage: argparse.Namespace, head: argparse.Namespace) -> str:
    """Both ports of the site's one stage are used: that over TLS by another pipeline. Returns the replica's trouble."""
    service = site.replicas[0][0].service
    context = read_tls(tls_server, stage)
    http = stage_process.HttpServer(
        lambda incoming: incoming.respond(200, b"{}"), stage_process.ServerLimits(), None, None
    )
    listener = await asyncio.get_running_loop().create_server(
        lambda: stage_process.PortSharing(service, http), "127.0.0.1", 0, ssl=context
    )
    site.engine.pipeline._context = read_tls(tls_client, head)
    site.engine.pipeline.set_replicas([[f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"]])
    try:
        replica = site.engine.pipeline.replicas[0][-1]
        await until(lambda: replica.up or replica.trouble)
        if replica.up:
            assert await site.complete(PROMPT, 24) == recorded("llama")[0]
        return replica.trouble
    finally:
        listener.close()
        await http.close(0.0)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("good", ""),
        ("head of another authority", "it may not accept this head's certificate"),
        ("stage of another authority", "certificate verify failed"),
        ("stage of another host", "IP address mismatch"),
    ],
)
def test_both_ends_show_a_certificate(tmp_path: Path, case: str, said: str) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    stage = options(ours.ca, *ours.issue("stage", host="IP:127.0.0.9" if case.endswith("host") else "IP:127.0.0.1"))
    head = options(ours.ca, *ours.issue("head"))
    if case == "head of another authority":
        head = options(ours.ca, *other.issue("head"))
    if case == "stage of another authority":
        stage = options(ours.ca, *other.issue("stage"))

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            trouble = await with_stage_over_tls(site, stage, head)
            assert said in trouble
            assert bool(trouble) == bool(said)

    asyncio.run(main())


def test_files_that_are_missing_or_none_are_named(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = ours.issue("stage")
    with pytest.raises(StagedModelError, match=r"--tls-key .*none: cannot be read: No such file"):
        read_tls(tls_server, options(ours.ca, certificate, tmp_path / "none"))
    with pytest.raises(StagedModelError, match=r"--tls-key .*stage.pem, .*not a certificate, its key"):
        read_tls(tls_client, options(ours.ca, certificate, certificate))
    assert key.exists()
