"""The journal of a study knows a run by the code that it runs, not by that of other rivals."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest

from chiron.studies.trial import _of_others, code_digest

PACKAGE = Path(str(resources.files("chiron")))


POLICIES = ("chiron", "keda-hpa", "keda-hpa-tuned", "llumnix", "chiron+stage-hpa", "chiron+stage-petals")
"""By name, some with a stage policy."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE / "policies", root / "policies", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return root


def digests(root: Path) -> dict[str, str]:
    _of_others.cache_clear()
    return {name: code_digest.__wrapped__(*name.split("+"), package=root) for name in POLICIES}


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, str]:
    return digests(copy)


@pytest.mark.parametrize(
    ("changed", "computed_anew"),
    [
        ("rivals/newcomer.py", ()),
        ("registry.py", ()),
        ("rivals/tuned.py", ()),
        ("rivals/scalers/keda.py", ("keda-hpa", "keda-hpa-tuned")),
        ("rivals/scalers/hpa.py", ("keda-hpa", "keda-hpa-tuned", "chiron+stage-hpa")),
        ("rivals/scalers/each_model.py", ("keda-hpa", "keda-hpa-tuned", "llumnix", "chiron+stage-hpa")),
        ("chiron/load.py", ("chiron", "chiron+stage-hpa", "chiron+stage-petals")),
        ("headroom.py", POLICIES),
        ("size.py", POLICIES),
    ],
)
def test_a_change_counts_for_those_who_run_it(
    changed: str, computed_anew: tuple[str, ...], copy: Path, before: dict[str, str]
) -> None:
    path = copy / "policies" / changed
    had = path.read_bytes() if path.exists() else None
    path.write_bytes((had or b"") + b"CHANGED = True\n")
    after = digests(copy)
    if had is None:
        path.unlink()
    else:
        path.write_bytes(had)
    assert tuple(name for name in POLICIES if after[name] != before[name]) == computed_anew


def test_what_only_tells_a_reader_something_does_not_count(copy: Path, before: dict[str, str]) -> None:
    path = copy / "policies" / "size.py"
    had = path.read_bytes()
    path.write_bytes(had.replace(b'"""', b'"""Said otherwise. ', 1) + b"# A comment.\n")
    after = digests(copy)
    path.write_bytes(had)
    assert after == before
