"""Speaks with one Ray cluster for a fleet: ``PYTHON agent.py --address A --namespace N``, with any Python that has Ray.

Why a process of its own: calls to Ray block, can hang for ever, and a driver whose cluster dies is ended by Ray
itself. The fleet gives each question a deadline and starts another agent after one that missed it; nothing is lost,
because what runs is told by names in the cluster. It may also be another Python: Ray wants the versions of Ray and
Python that the cluster has, and Chiron does not.

A question and its answer are one line of JSON each, on standard input and output. There is one question: make it so
that these instances are there (``start``) and those are not (``stop``), take these for yours (``hold``) and tell of
all in the namespace. Asked again it changes nothing, so an answer that got lost costs nothing. The agent ends with
its standard input.

An instance is a placement group with one bundle per node, and in each bundle a detached actor (``EngineHost``) that
runs the engine's command there. Group and actors have the instance's name (``#0``, ``#1`` ... behind it), so a pending
group is demand that Ray's autoscaler sees, and whoever comes later finds what runs. The actor's class is sent by
value: nodes need no Chiron. Standard library and Ray only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LEASE_S = 5.0
"""An actor that its gateway has not asked for so long may be taken over by another one."""
ANSWERS_S = 1.0
"""Longest that one answer waits for actors; those that are late are told as they were."""
STOP_MARGIN_S = 5.0
"""Beyond the grace of the engine, before its actor is killed."""
WORDS_MAX = 400
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class EngineHost:
    """An actor: one engine's process on the node of its bundle, under a supervisor that ends with the actor.

    ``idle``: nothing has begun; ``starting``; ``ready``: the engine has a port (whether it answers there is for those
    who ask it); ``ended``.
    """

    def __init__(self) -> None:
        import ray

        self._phase = "idle"
        self._host = str(ray.util.get_node_ip_address())
        self._port = 0
        self._leader_port = self._free_port()
        self._why = ""
        self._log = ""
        self._process: Any = None
        self._holder = ""
        self._held_s = 0.0

    def look(self, holder: str, lease_s: float) -> dict[str, Any]:
        """As it is now. ``holder``: the gateway that asks, which has it from now on unless another one has; empty: only
        look. A name that begins with ``-`` gives it back."""
        import time

        now_s = time.monotonic()
        taken = bool(self._holder) and now_s - self._held_s < lease_s
        if holder.startswith("-"):
            if self._holder == holder[1:]:
                self._holder, taken = "", False
        elif holder and (not taken or self._holder == holder):
            self._holder, self._held_s, taken = holder, now_s, True
        return {
            "phase": self._phase,
            "host": self._host,
            "port": self._port,
            "leader_port": self._leader_port,
            "why": self._why,
            "holder": self._holder if taken else "",
        }

    def begin(self, order: dict[str, Any]) -> None:
        """Start the engine. Harmless twice."""
        import os
        import subprocess
        import sys
        import tempfile
        import threading

        if self._phase != "idle":
            return
        self._phase = "starting"
        port = self._free_port()
        values = {**order["values"], "python": sys.executable, "host": self._host, "port": str(port)}
        command = [self._filled(word, values) for word in order["command"]]
        if any("{port}" in word for word in order["command"]) and order["rank"] == 0:
            self._port = port
        directory = tempfile.gettempdir()
        try:
            import ray

            directory = ray._private.worker.global_worker.node.get_logs_dir_path()
        except Exception:  # Where Ray keeps its logs is not its public interface.
            pass
        self._log = os.path.join(directory, f"chiron-engine-{os.getpid()}.log")
        supervisor = [sys.executable, "-I", "-S", "-c", order["supervisor"], "--grace-s", str(order["grace_s"])]
        supervisor += ["--log", self._log, "--log-bytes-max", str(order["log_bytes_max"]), "--", *command]
        # By way of a shell that ends at once: Ray kills the children of a worker that it ends, and the supervisor
        # must outlive it to end the engine.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 3<&- &', "sh", *supervisor],
            env={**os.environ, **order["env"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._port:
            self._phase = "ready"
        threading.Thread(target=self._listen, daemon=True).start()

    def end(self, holder: str, lease_s: float) -> None:
        """Ask the engine to end: SIGTERM, and SIGKILL after the grace. Not if another gateway has it: whoever asks may
        have lost it, and not know that yet."""
        import time

        if self._holder not in ("", holder) and time.monotonic() - self._held_s < lease_s:
            return
        if self._process is None:
            self._phase = "ended"
        elif not self._process.stdin.closed:
            self._process.stdin.close()

    def _listen(self) -> None:
        how = "its supervisor was killed"
        for line in self._process.stdout:
            word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
            if word == "ready" and not self._port:
                self._port, self._phase = int(rest), "ready"
            elif word == "exit":
                status = int(rest)
                how = f"it was killed by signal {status - 128}" if status > 128 else f"it exited with status {status}"
            elif word == "error":
                how = rest
        self._why = how + self._tail()
        self._phase = "ended"

    def _tail(self) -> str:
        try:
            with open(self._log, "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().decode(errors="replace").splitlines()[-8:]
        except OSError:
            return ""
        return f"; last lines of {self._log}:\n" + "\n".join(lines)

    def _free_port(self) -> int:
        import socket

        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as probe:
            probe.bind((self._host, 0))
            return int(probe.getsockname()[1])

    def _filled(self, word: str, values: Mapping[str, str]) -> str:
        for name, value in values.items():
            word = word.replace("{" + name + "}", value)
        return word


class Agent:
    """Answers questions; blocks."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._prefix = f"chiron:{namespace}:"
        self._actors: dict[str, Any] = {}
        """Handles, by name."""
        self._asked: dict[str, tuple[Any, str]] = {}
        """What each actor has been asked and has not answered yet, and for whom."""
        self._told: dict[str, dict[str, Any]] = {}
        """Their last answers."""
        self._placed: set[str] = set()
        """Those on a node: who holds them is to be known before anything is done."""
        self._waited: set[str] = set()
        """For the first answer of these the agent has waited once."""
        self._began: set[str] = set()
        self._stopping: dict[str, float] = {}
        """Until when their engines may take to end, by instance."""

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        orders = {order["name"]: order for order in question["start"]}
        holds, stops = set(question["hold"]), dict(question["stop"])
        groups = self._groups()
        refused: dict[str, str] = {}
        for name, order in orders.items():
            if name not in groups and name not in stops:
                with _into(refused, name):
                    self._place(order)
        if set(orders) - set(groups):
            groups = self._groups()
        for name, group in groups.items():
            for rank in range(len(group["bundles"])):
                self._find(f"{name}#{rank}")
            if name in orders and name not in stops:
                with _into(refused, name):
                    self._populate(name, group, orders[name])
            holder = "-" + question["holder"] if name in question["free"] else question["holder"]
            if group["state"] == "CREATED":
                self._placed.update(self._members(name, group))
            for actor in self._members(name, group):
                self._ask(actor, holder if name in holds or name in question["free"] else "")
        self._hear()
        for name, order in orders.items():
            if name in groups and name not in stops:
                self._begin(name, groups[name], order)
        for name in [name for name in stops if name in groups]:
            self._stop(name, groups[name], stops[name], "" if question["force"] else question["holder"])
        self._forget(groups)
        seen = [self._seen(name, group, name in stops) for name, group in groups.items()]
        known = [each for each in seen if each["name"] not in refused]
        return {"instances": [*known, *(_refused(*each) for each in refused.items())], "nodes": self._nodes()}

    def _groups(self) -> dict[str, dict[str, Any]]:
        from ray.util.placement_group import placement_group_table

        table = placement_group_table().values()
        return {
            each["name"]: each for each in table if each["state"] != "REMOVED" and each["name"].startswith(self._prefix)
        }

    def _place(self, order: Mapping[str, Any]) -> None:
        """Ask for the nodes of an instance."""
        from ray.util.placement_group import placement_group

        bundles = [order["resources"]] * order["nodes"]
        strategy = "STRICT_PACK" if order["nodes"] == 1 else "STRICT_SPREAD"
        placement_group(bundles, strategy=strategy, name=order["name"], lifetime="detached")

    def _find(self, actor: str) -> None:
        import ray

        if actor not in self._actors:
            with contextlib.suppress(ValueError):  # There is none.
                self._actors[actor] = ray.get_actor(actor, self._namespace)

    def _populate(self, name: str, group: Mapping[str, Any], order: Mapping[str, Any]) -> None:
        """An actor in each bundle; it waits with its group."""
        import ray
        from ray.util.placement_group import PlacementGroup
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        whole = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"])))
        own = {key: value for key, value in order["resources"].items() if key not in ("CPU", "GPU", "memory")}
        for rank in range(order["nodes"]):
            actor = f"{name}#{rank}"
            if actor in self._actors:
                continue
            make = ray.remote(EngineHost).options(
                name=actor,
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=0,
                num_cpus=order["resources"].get("CPU", 0),
                num_gpus=order["resources"].get("GPU", 0),
                memory=order["resources"].get("memory"),
                resources=own,
                scheduling_strategy=PlacementGroupSchedulingStrategy(whole, rank),
            )
            with contextlib.suppress(ValueError):  # Somebody was quicker: found by name next time.
                self._actors[actor] = make.remote()

    def _members(self, name: str, group: Mapping[str, Any]) -> list[str]:
        names = [f"{name}#{rank}" for rank in range(len(group["bundles"]))]
        return [actor for actor in names if actor in self._actors]

    def _ask(self, actor: str, holder: str) -> None:
        if actor not in self._asked and self._told.get(actor, {}).get("phase") != "gone":
            self._asked[actor] = self._actors[actor].look.remote(holder, LEASE_S), holder

    def _hear(self) -> None:
        """The answers that are there soon."""
        import ray

        waiting = {reference: actor for actor, (reference, _) in self._asked.items()}
        if not waiting:
            return
        until_s = time.monotonic() + ANSWERS_S
        left = list(waiting)
        while left:
            # As they come: one actor whose group is pending must not hold up the rest for longer than a moment.
            patience_s = until_s - time.monotonic() if any(self._is_placed(waiting[each]) for each in left) else 0.0
            done, left = ray.wait(left, num_returns=1, timeout=max(0.0, patience_s))
            if not done:
                break
            for reference in done:
                self._told[waiting[reference]] = self._value(reference)
                del self._asked[waiting[reference]]
        self._waited |= self._placed

    def _is_placed(self, actor: str) -> bool:
        """It has answered before, or is on a node and nobody has waited for its first answer yet."""
        return actor in self._told or actor in self._placed - self._waited

    def _value(self, reference: Any) -> dict[str, Any]:
        import ray

        try:
            value: dict[str, Any] = ray.get(reference, timeout=ANSWERS_S)
        except ray.exceptions.RayError as error:
            # Only a dead actor is gone: an answer that is late or lost says nothing of it.
            died = isinstance(error, ray.exceptions.RayActorError)
            away = isinstance(error, ray.exceptions.ActorUnavailableError)
            return {"phase": "gone" if died and not away else "unknown", "why": words(error)}
        return value

    def _begin(self, name: str, group: Mapping[str, Any], order: Mapping[str, Any]) -> None:
        """The engine's processes, the leader's first: the others are told where it is."""
        leader = self._told.get(f"{name}#0")
        if leader is None or "host" not in leader:
            return
        for rank in range(order["nodes"]):
            actor = f"{name}#{rank}"
            if actor in self._began or self._told.get(actor, {}).get("phase") != "idle":
                continue
            if self._told[actor].get("holder") != order["holder"]:
                continue
            values = {
                "leader": leader["host"],
                "leader_port": str(leader["leader_port"]),
                "rank": str(rank),
                "nodes": str(order["nodes"]),
            }
            command = [*order["command"], *(order["follower_args"] if rank else ())]
            self._actors[actor].begin.remote({**order, "command": command, "values": values, "rank": rank})
            self._began.add(actor)

    def _stop(self, name: str, group: Mapping[str, Any], grace_s: float, holder: str) -> None:
        """The engines first, while their actors hold what they run on; then the rest. ``holder``: who asks, and so
        leaves alone what another one has; empty: whoever has it."""
        import ray
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        members = self._members(name, group)
        if holder and any(self._told.get(each, {}).get("holder", "") not in ("", holder) for each in members):
            self._stopping.pop(name, None)
            return
        if name not in self._stopping:
            self._stopping[name] = time.monotonic() + grace_s + STOP_MARGIN_S
            for actor in members:
                self._actors[actor].end.remote(holder, LEASE_S if holder else 0.0)
        # One that has not answered yet may run an engine, but for those that have no node.
        silent = "unknown" if group["state"] == "CREATED" else "gone"
        running = [each for each in members if self._phase(each, silent) not in ("ended", "gone")]
        if running and time.monotonic() < self._stopping[name]:
            return
        for actor in members:
            ray.kill(self._actors[actor], no_restart=True)
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))))

    def _phase(self, actor: str, silent: str) -> str:
        told = self._told.get(actor)
        return silent if told is None else str(told["phase"])

    def _forget(self, groups: Iterable[str]) -> None:
        """What belongs to groups that are gone."""
        for table in (self._actors, self._told, self._asked):
            for actor in [actor for actor in table if actor.rpartition("#")[0] not in groups]:
                del table[actor]
        for names in (self._began, self._placed, self._waited):
            names &= self._actors.keys()
        self._stopping = {name: until_s for name, until_s in self._stopping.items() if name in groups}

    def _seen(self, name: str, group: Mapping[str, Any], stopping: bool) -> dict[str, Any]:
        members = [self._told.get(f"{name}#{rank}") for rank in range(len(group["bundles"]))]
        heard = [each for each in members if each is not None]
        placed = all(group["bundles_to_node_id"].values()) and group["state"] == "CREATED"
        phases = {each["phase"] for each in heard}
        missing = placed and any(f"{name}#{rank}" not in self._actors for rank in range(len(members)))
        bad = next((each for each in heard if each["phase"] in ("gone", "ended")), None)
        if bad is not None:
            phase, why = bad["phase"], bad["why"]
        elif missing:
            phase, why = "gone", "its actor is gone"
        elif not heard:
            # Not idle: it may be somebody's, and only slow to say so.
            phase, why = ("unknown", "its actor is being started") if placed else ("pending", self._why_pending(group))
        else:
            phase = next(each for each in ("unknown", "idle", "starting", "ready") if each in phases)
            if phase == "starting" and heard[0]["phase"] == "ready" and len(heard) == len(members):
                phase = "ready"  # Only the first of them has a port that matters.
            why = next((each["why"] for each in heard if each["why"]), "")
        first = members[0] or {}
        return {
            "name": name,
            "phase": phase,
            "why": why[: 4 * WORDS_MAX],
            "host": first.get("host", ""),
            "port": first.get("port", 0),
            "holder": next((each["holder"] for each in heard if each.get("holder")), ""),
            "stopping": stopping or name in self._stopping,
        }

    def _why_pending(self, group: Mapping[str, Any]) -> str:
        needs = ", ".join(f"{key} {value:g}" for key, value in sorted(group["bundles"][0].items()))
        each = f" each of {len(group['bundles'])} nodes" if len(group["bundles"]) > 1 else ""
        if group["state"] == "RESCHEDULING":
            return f"a node of it was lost; Ray looks for another with {needs}"
        if group.get("stats", {}).get("scheduling_state") == "INFEASIBLE":
            return f"no node of the cluster is large enough: it needs {needs}{' on' + each if each else ''}"
        return f"no node has room now: it needs {needs}{' on' + each if each else ''}"

    def _nodes(self) -> list[dict[str, Any]]:
        import ray

        shown = ("CPU", "GPU", "memory")
        return [
            {
                "address": node["NodeManagerAddress"],
                "resources": {
                    key: value
                    for key, value in node["Resources"].items()
                    if key in shown or not (key.startswith("node:") or "_group_" in key or key == "object_store_memory")
                },
            }
            for node in ray.nodes()
            if node["Alive"]
        ]


@contextlib.contextmanager
def _into(refused: dict[str, str], name: str) -> Iterator[None]:
    """What Ray refuses of one instance is told of that one."""
    try:
        yield
    except Exception as error:
        refused[name] = f"Ray refuses it: {words(error)}"


def _refused(name: str, why: str) -> dict[str, Any]:
    return {"name": name, "phase": "ended", "why": why, "host": "", "port": 0, "holder": "", "stopping": False}


def words(error: BaseException) -> str:
    """The sentence that tells most: Ray's errors are pages."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("The actor is dead", "The actor died", "The node"))]
    return ((said or lines or [type(error).__name__])[-1])[:WORDS_MAX]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", required=True, help="of the cluster; 'auto': the one of this machine")
    parser.add_argument("--namespace", required=True, help="of the actors")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever Ray prints is no answer.
    questions = _questions()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each or ".") != here]

    def say(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        import ray

        ray.init(address=options.address, namespace=options.namespace, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        say({"error": f"{type(error).__name__}: {words(error)}"})
        os._exit(1)
    say({"ray": ray.__version__})
    agent = Agent(options.namespace)
    for question in questions:
        try:
            say(agent.answer(question))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {words(error)}"})


def _questions() -> Iterator[Any]:
    """Read by a thread from now on, so that the end of standard input ends the agent also while Ray hangs."""
    waiting: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return iter(waiting.get, None)


if __name__ == "__main__":
    main()
