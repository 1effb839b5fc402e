"""What the commands share: errors to exit codes, JSON, the progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from chebface.errors import ChebfaceError, MissingDependencyError

INTERRUPTED = 130
EXTRAS = {"torch": "torch", "safetensors": "torch", "onnxruntime": "detect", "onnx": "export", "tomli": "torch"}
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def guarded(run: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one line on stderr and their exit code."""

    @wraps(run)
    def command(**options: Any) -> None:
        try:
            run(**options)
        except ChebfaceError as error:
            if options.get("as_json"):
                print_json({"ok": False, "error": type(error).__name__, "message": str(error)})
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            extra = EXTRAS.get(package)
            if extra is None:
                raise
            click.echo(f"error: {package} is not installed: pip install 'chebface[{extra}]'", err=True)
            sys.exit(MissingDependencyError.exit_code)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(ChebfaceError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; finished work is kept, nothing half-written is left", err=True)
            sys.exit(INTERRUPTED)

    return command


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def print_json(content: Any) -> None:
    """JSON on stdout, in one line."""
    click.echo(json.dumps(content))


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; gives a function to call with done and total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
