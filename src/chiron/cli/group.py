"""How the command line fails: bad input is one line and exit status 2, ctrl-C is 130; only a bug shows a traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from chiron.config.read import ConfigError
from chiron.core.units import DurationError
from chiron.engines.profile import ProfileError
from chiron.load.errors import LoadError
from chiron.telemetry.errors import TelemetryError
from chiron.workload.errors import WorkloadError

BAD_INPUT = (ConfigError, DurationError, LoadError, ProfileError, TelemetryError, WorkloadError, OSError)
INTERRUPTED = 130


class ErrorsInALine(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BAD_INPUT as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(INTERRUPTED) from None
