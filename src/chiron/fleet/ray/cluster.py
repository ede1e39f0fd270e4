"""What the fleet asks of a Ray cluster, and what it is told: one question, which changes nothing if asked again."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import quote, unquote

Phase = Literal["pending", "idle", "starting", "ready", "ended", "gone", "unknown"]
"""``pending``: no node has room; ``idle``: placed, and nothing begun; ``starting``; ``ready``: its engine has a port;
``ended``: its engine has; ``gone``: its actor or its node is; ``unknown``: Ray cannot reach its actor now."""
PHASES: tuple[Phase, ...] = ("pending", "idle", "starting", "ready", "ended", "gone", "unknown")
LEASE_S = 5.0
"""An instance that its gateway has not asked for so long may be taken over by another one; the agent has the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """Of an instance, everywhere in the cluster."""

    namespace: str
    kind: str
    fingerprint: str
    """Of the settings that it was started with."""
    owner: str
    """Who asked for it: one gateway, or several that replace each other; empty: not said."""
    number: str

    def __str__(self) -> str:
        mine = f"{self.owner}-" if self.owner else ""
        return f"chiron:{self.namespace}:{quote(self.kind, safe='')}:{self.fingerprint}:{mine}{self.number}"


_NAME = re.compile(
    r"chiron:(?P<namespace>[\w.-]{1,100}):(?P<kind>[\w.~%-]{1,1000}):(?P<fingerprint>[0-9a-f]{12})"
    r":((?P<owner>[0-9a-f]{8})-)?(?P<number>[0-9a-f]{8})",
    re.ASCII,
)


def new_name(namespace: str, kind: str, fingerprint: str, owner: str = "") -> str:
    number = secrets.token_hex(4)
    return str(Name(namespace=namespace, kind=kind, fingerprint=fingerprint, owner=owner, number=number))


def read_name(text: str) -> Name | None:
    """None: not one of ours."""
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    return Name(
        namespace=found["namespace"],
        kind=unquote(found["kind"]),
        fingerprint=found["fingerprint"],
        owner=found["owner"] or "",
        number=found["number"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An instance that should be there."""

    name: str
    nodes: int
    resources: Mapping[str, float]
    command: tuple[str, ...]
    follower_args: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    grace_s: float
    log_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    start: tuple[Order, ...] = ()
    """Instances that should be there, until their engines have begun."""
    stop: Mapping[str, float] = field(default_factory=dict)
    """Those that should not, and the seconds that their engines get to end. What another gateway has is left alone."""
    force: bool = False
    """Stop them whoever has them."""
    hold: frozenset[str] = frozenset()
    """Those that this gateway has."""
    free: frozenset[str] = frozenset()
    """Those that it gives back."""
    holder: str
    """This gateway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One instance as it is."""

    name: str
    phase: Phase
    why: str = ""
    """In words: what it waits for, or how it ended."""
    host: str = ""
    port: int = 0
    """Of its engine; 0 until known."""
    holder: str = ""
    """The gateway that has it; empty: none."""
    stopping: bool = False

    @property
    def free(self) -> bool:
        """No gateway has it. What waits for a node has no actor that could say whose it is, and one that Ray cannot
        reach says nothing: a gateway that runs may have asked for it."""
        return not self.holder and self.phase not in ("pending", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    instances: tuple[Seen, ...] = ()
    """All of the namespace, whoever has started them."""
    nodes: tuple[Node, ...] = ()
    """Those that are alive."""


class RayError(Exception):
    """The cluster cannot be asked; the message says why."""


class RayCluster(Protocol):
    """One namespace of one cluster."""

    async def ask(self, question: Question) -> Answer:
        """Raises RayError, always within a deadline."""

    async def close(self) -> None:
        """What runs in the cluster goes on."""
