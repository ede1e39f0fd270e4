"""How the command line fails: bad input is one line and exit status 2, ctrl-C is 130; only a bug shows a traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from chiron.core.errors import InputError

INTERRUPTED = 130


def in_words(error: Exception) -> str:
    """What went wrong with which file, without numbers of the system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class ErrorsInALine(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read the output has seen enough, such as head; the framework ends quietly then.
            raise
        except (InputError, OSError) as error:
            typer.echo(f"error: {in_words(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(INTERRUPTED) from None
