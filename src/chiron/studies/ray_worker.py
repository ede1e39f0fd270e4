"""Hands trials to a Ray cluster: ``PYTHON ray_worker.py --address A --package DIR``, with any Python that has Ray.

What it reads and writes is said in ``chiron.studies.executors``; trials pass through it unread. The cluster's nodes
need Python with NumPy and no Chiron: the source that is used here is sent to them, so that every node computes the
same. A process of its own, because a driver whose cluster dies is ended by Ray itself, and because Ray wants the
versions of Ray and Python that the cluster has. It ends with its standard input. Standard library and Ray only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
import sys
import threading
import zipfile
from typing import Any

WAIT_S = 0.2
"""Longest that new trials wait for a look."""
QUEUED = 2
"""Trials at a time for each CPU of the cluster: one runs, and one is demand that Ray's autoscaler sees."""
DATA = ("data/result.schema.json",)
"""What a simulation reads besides code."""
WORDS_MAX = 400


def simulate(code: bytes, task: bytes) -> str:
    """On a node: the line about one task. Sent by value, so it imports all that it needs."""
    import atexit
    import io
    import json
    import shutil
    import sys
    import tempfile
    import zipfile

    if getattr(sys, "chiron_code", None) is None:  # Once for each of Ray's processes, which is of this driver alone.
        root = tempfile.mkdtemp(prefix="chiron-")
        atexit.register(shutil.rmtree, root, True)
        with zipfile.ZipFile(io.BytesIO(code)) as archive:
            archive.extractall(root)
        for name in [name for name in sys.modules if name.partition(".")[0] == "chiron"]:
            del sys.modules[name]
        sys.path.insert(0, root)
        sys.chiron_code = root  # type: ignore[attr-defined]
    from chiron.studies.worker import done

    return json.dumps(done(task))


def packed(package: str) -> bytes:
    """The package's source."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, folders, names in os.walk(package):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                inside = os.path.relpath(path, package)
                if name.endswith(".py") or inside in DATA:
                    archive.write(path, os.path.join("chiron", inside))
    return made.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", required=True, help="of the cluster; 'auto': the one of this machine")
    parser.add_argument("--package", required=True, help="folder of the source that nodes run")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever Ray prints is no answer.
    tasks = _tasks()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each or ".") != here]

    def say(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        import ray

        ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            raise RuntimeError("the cluster has no CPU")
    except Exception as error:
        say({"fatal": f"--ray {options.address}: {type(error).__name__}: {_words(error)}"})
        os._exit(1)
    say({"slots": QUEUED * cpus})
    code = ray.put(packed(options.package))
    remote = ray.remote(num_cpus=1)(simulate)
    running: dict[Any, int] = {}
    while True:
        # Without a trial there is nothing to do but to wait for one.
        while (task := _next(tasks, wait=not running)) is not None:
            number, data = task
            running[remote.remote(code, data)] = number
        ended, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_S)
        for each in ended:
            number = running.pop(each)
            try:
                say({**json.loads(ray.get(each)), "number": number})
            except Exception as error:
                cause = getattr(error, "cause", error)
                if isinstance(cause, ImportError):
                    say(
                        {"fatal": f"--ray {options.address}: a node's Python lacks {cause.name or 'a module'}: {cause}"}
                    )
                say({"number": number, "error": f"{type(error).__name__}: {_words(error)}"})


def _tasks() -> queue.SimpleQueue[tuple[int, bytes]]:
    """Read by a thread from now on, so that the end of standard input ends this process also while Ray hangs."""
    waiting: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
    source = sys.stdin.buffer

    def read() -> None:
        while len(head := source.read(16)) == 16:
            waiting.put((int.from_bytes(head[:8], "big"), source.read(int.from_bytes(head[8:], "big"))))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return waiting


def _next(tasks: queue.SimpleQueue[tuple[int, bytes]], *, wait: bool) -> tuple[int, bytes] | None:
    try:
        return tasks.get(block=wait)
    except queue.Empty:
        return None


def _words(error: BaseException) -> str:
    """In a line; of a traceback the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "")[:WORDS_MAX]


if __name__ == "__main__":
    main()
