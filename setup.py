"""The optional compiled build: ``CHIRON_COMPILE=1 pip install .``

All that describes the package is in pyproject.toml. This adds one thing to it: what a simulation spends its time in is
compiled by mypyc, from the same source and with equal results. Without the variable, without a C compiler and in an
editable install the package is plain Python, which works as well. ``chiron --version`` says which of
the two it is, and why if it was to be compiled and is not.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from typing import Any

import setuptools
from setuptools.command.build_py import build_py

COMPILED = (
    "core/clock.py",
    "core/types.py",
    "control/*.py",
    "engines/claims.py",
    "engines/model.py",
    "engines/pipeline.py",
    "engines/pipeline_rounds.py",
    "gateway/brain/desk.py",
    "gateway/brain/hearing.py",
    "gateway/brain/relay_link.py",
    "gateway/brain/relays.py",
    "gateway/instances/engine.py",
    "gateway/instances/observer.py",
    "gateway/port/wire.py",
    "gateway/relay/admission.py",
    "gateway/relay/body.py",
    "gateway/relay/calls.py",
    "gateway/relay/cross_site.py",
    "gateway/relay/front.py",
    "gateway/relay/key_ring.py",
    "gateway/relay/token_bucket.py",
    "gateway/relay/uplink/brain_link.py",
    "gateway/relay/uplink/held.py",
    "gateway/relay/uplink/instances.py",
    "gateway/relay/uplink/item.py",
    "gateway/relay/uplink/tellers.py",
    "gateway/relay/uplink/uplink.py",
    "gateway/relay/upstream.py",
    "gateway/reporting/journal.py",
    "gateway/reporting/live_result.py",
    "net/client.py",
    "net/clock.py",
    "net/connection.py",
    "net/incoming.py",
    "net/shares.py",
    "policies/capacity.py",
    "policies/chiron/local_loop.py",
    "policies/chiron/token_budget.py",
    "policies/queues/deadline_groups.py",
    "policies/routers/gated.py",
    "policies/routers/least.py",
    "policies/queues/order.py",
    "policies/queues/overload.py",
    "policies/routers/packing.py",
    "policies/routers/packing_pools.py",
    "policies/routers/packing_spread.py",
    "policies/policy.py",
    "policies/size.py",
    "policies/routers/stale_entries.py",
    "policies/views.py",
)
"""What runs for each request, step or scrape. The rest costs more to compile than it saves. What users configure is not
among them: a compiled class has lost the annotations by which it is read, and turns 1 into 1.0."""

MYPY = """
[mypy]
no_site_packages = True
ignore_missing_imports = True
disable_error_code = call-arg
[mypy-chiron.api]
follow_imports = skip
"""
"""Nothing that is installed is looked at: pip builds where nothing is, and following ray's imports takes gigabytes.
So the keywords of msgspec's classes are not known; whether types are right ``make lint`` says. What is compiled needs
nothing of the API, which needs everything."""

BUILDS = {"bdist_wheel", "build", "build_ext", "install"}
COMPILER = "mypy>=2.4"
REASON = "not_compiled.txt"


def wanted() -> bool:
    value = os.environ.get("CHIRON_COMPILE", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"error: CHIRON_COMPILE is {value!r}; it must be 0 or 1")
    return value == "1"


def obstacle() -> str:
    """Why it cannot be compiled here; empty if it can."""
    # Those of setuptools, which it puts there when it is imported.
    from distutils.ccompiler import new_compiler
    from distutils.errors import CCompilerError, DistutilsError
    from distutils.sysconfig import customize_compiler

    if find_spec("mypyc") is None:
        return f"{COMPILER} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <Python.h>\nint probe(void) { return PY_VERSION_HEX; }\n")
        compiler = new_compiler()
        customize_compiler(compiler)
        try:
            compiler.compile([str(source)], output_dir=folder, include_dirs=[get_path("include")])
        except (CCompilerError, DistutilsError, OSError) as error:
            return f"no C compiler that finds Python.h: {error}"
    return ""


def extensions() -> list[Any]:
    from mypyc.build import mypycify

    package = Path("src/chiron")
    files = sorted(str(file) for pattern in COMPILED for file in package.glob(pattern) if file.name != "__init__.py")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mypy.ini"
        config.write_text(MYPY)
        # Higher levels of optimisation take twice as long to compile and gain nothing that can be measured.
        return mypycify([f"--config-file={config}", *files], group_name="chiron", opt_level="1", debug_level="0")


class BuildAnew(build_py):
    """Takes nothing of an earlier build in the same checkout: what it compiled and this one does not would stay. Leaves
    the reason in the package why it is not compiled, as pip shows nothing of what a build says."""

    def run(self) -> None:
        package = Path(self.build_lib) / "chiron"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        if WHY_NOT:
            (package / REASON).write_text(WHY_NOT + "\n")


MAKES_FILES = bool(BUILDS & set(sys.argv))
WHY_NOT = obstacle() if wanted() and MAKES_FILES else ""
if WHY_NOT:
    print(f"warning: CHIRON_COMPILE=1, but installed as plain Python: {WHY_NOT}", file=sys.stderr)

setuptools.setup(
    setup_requires=[COMPILER] if wanted() and not MAKES_FILES else [],
    ext_modules=extensions() if wanted() and MAKES_FILES and not WHY_NOT else [],
    cmdclass={"build_py": BuildAnew},
)
