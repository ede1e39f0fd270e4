"""What a pod's object says: the reasons that clusters give, and what is not believed."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from chiron.fleet.kubernetes.client import refusal
from chiron.fleet.kubernetes.pods import read_pod


def pod(status: dict[str, Any], **meta: Any) -> dict[str, Any]:
    return {"metadata": {"name": "engine-3", "uid": "u", **meta}, "spec": {"nodeName": "n"}, "status": status}


def container(state: dict[str, Any] | None = None, last: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    said = {"name": "engine", "image": "i", "ready": False, "state": state or {}, "lastState": last or {}}
    return {"containerStatuses": [{**said, **more}]}


def condition(kind: str, status: str, **more: str) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": status, **more}]}


WAITING = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
NO_GPU = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        ({}, None),
        (condition("PodScheduled", "False", reason="Unschedulable", message=NO_GPU), f"unschedulable: {NO_GPU}"),
        (condition("PodScheduled", "False", reason="SchedulingGated"), None),
        (
            container({"waiting": {"reason": "ErrImagePull", "message": "no such\n image"}}),
            "image: ErrImagePull: no such image",
        ),
        (container({"waiting": {"reason": "InvalidImageName"}}), "image: InvalidImageName: i"),
        (container({"waiting": {"reason": "ContainerCreating"}}), None),
        (container(WAITING, {"terminated": {"exitCode": 1}}), "crash loop: engine ended (exit code 1): back-off 10s"),
        (container({"terminated": {"exitCode": 2, "message": "boom"}}), "crash loop: engine ended (exit code 2): boom"),
        (
            container(WAITING, {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
            "out of memory: engine was killed for its memory",
        ),
        (container({"running": {}}, {"terminated": {"exitCode": 1}}, ready=True), None),
        ({"reason": "NodeLost", "message": "node n is gone"}, "node lost: node n is gone"),
        (condition("Ready", "False", reason="NodeNotReady"), "node lost: NodeNotReady"),
        (condition("DisruptionTarget", "True", reason="DeletionByTaintManager"), "node lost: DeletionByTaintManager"),
    ],
)
def test_why_it_is_not_ready(status: dict[str, Any], cause: str | None) -> None:
    found = read_pod(pod(status)).cause
    assert (str(found) if found is not None else None) == cause


def test_ready_means_running_and_ready() -> None:
    ready = condition("Ready", "True")
    assert read_pod(pod({"phase": "Running", **ready})).ready
    assert not read_pod(pod({"phase": "Failed", **ready})).ready
    assert read_pod(pod({"phase": "Failed"})).over
    assert read_pod(pod({}, deletionTimestamp="2026-01-01T00:00:00Z")).deleting


@pytest.mark.parametrize(
    "said",
    [
        *("10.0.0.1", "fd00::1", "0.0.0.0", "224.0.0.1", "example.com", "10.0.0.1:80", 7, None),
        *("169.254.169.254", "fe80::1", "fd00::1%eth0", "fd00::1%]@10.0.0.1"),
    ],
)
def test_an_address_is_an_ip_address_or_none(said: object) -> None:
    assert read_pod(pod({"podIP": said})).address == (said if said in ("10.0.0.1", "fd00::1") else "")


@pytest.mark.parametrize(
    "nonsense",
    [
        {"conditions": "x", "containerStatuses": {"a": 1}, "phase": 3},
        {"conditions": [1, None], "containerStatuses": [{"restartCount": "many", "state": [], "lastState": 0}]},
        {"containerStatuses": [{"restartCount": 10**30}]},
    ],
)
def test_nonsense_is_read_as_nothing(nonsense: dict[str, Any]) -> None:
    found = read_pod(pod(nonsense))
    assert (found.ready, found.cause) == (False, None)
    assert 0 <= found.restarts < 1 << 31


@pytest.mark.parametrize(
    "meta",
    [
        *({"name": ""}, {"uid": None}, {"name": 3}, {"name": "x" * 1_000_000}, {"uid": "x" * 1_000_000}),
        *({"name": "a/../../nodes/b"}, {"name": "a\r\nb"}, {"name": "a?force"}, {"uid": "\x1b[2J"}, {"name": "a\n"}),
    ],
)
def test_without_a_sound_name_and_uid_it_is_no_pod(meta: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which is none") as error:
        read_pod(pod({}, **meta))
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


def test_what_a_cluster_says_is_one_short_line_without_control_characters() -> None:
    """It goes to terminals."""
    said = "\x1b[2J no\nroom \x00" + "x" * 1_000_000
    cause = read_pod(pod(condition("PodScheduled", "False", reason="Unschedulable", message=said))).cause
    for text in (
        str(cause),
        str(refusal(403, orjson.dumps({"message": said, "reason": said}))),
        str(refusal(502, said.encode())),
    ):
        assert "room" in text
        assert text.isprintable()
        assert len(text) < 1000
