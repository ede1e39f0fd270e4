"""Packages beyond the base install: which of them a command needs, and how to get them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from chiron.config.read import ConfigError
from chiron.engines.rows import ENGINES

EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": (
        "httptools",
        "msgspec",
        "orjson",
        "prometheus_client",
        "psutil",
        "python_multipart",
        "starlette",
        "uvloop",
    ),
    "postgres": ("psycopg",),
    "ray": ("ray",),
    **{row.extra: row.modules for row in ENGINES.values() if row.extra},
}
"""Modules of each extra of the package that serving may need."""
OPTIONAL = ("uvloop",)
"""Faster with it, fine without."""


def missing(extra: str) -> list[str]:
    """Modules of an extra that are not installed and are needed."""
    return [name for name in EXTRAS[extra] if name not in OPTIONAL and find_spec(name) is None]


def install_hint(extra: str) -> str:
    return f"pip install 'chiron-serving[{extra}]'"


def require_extras(extras: Iterable[str]) -> None:
    """Raise ConfigError, with the command that helps, unless everything is installed."""
    for extra in extras:
        lacking = missing(extra)
        if lacking:
            raise ConfigError(f"not installed: {', '.join(lacking)}; {install_hint(extra)}")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports inside come from this extra; if one fails, say which command helps."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "chiron":
            raise
        raise ConfigError(f"not installed: {error.name}; {install_hint(extra)}") from None
