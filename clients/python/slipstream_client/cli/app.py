"""The root of the command line: which verbs and nouns there are, and what becomes of a failure.

A noun is a file of this package with a ``typer.Typer()`` (or a function, for an everyday verb), named here once. Exit
codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from slipstream_client.cli import (
    adapters,
    chat,
    compare,
    config,
    datasets,
    doctor,
    generate,
    jobs,
    models,
    run,
    serve,
    status,
    tasks,
    terminal,
    tokens,
    top,
    train,
    up,
    version,
)
from slipstream_client.errors import SlipstreamClientError

NAME = "slipstream"

app = typer.Typer(
    name=NAME,
    help="Train, adapt and serve Hugging Face models over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TALK = "Talk to a model"
TEACH = "Teach it"
RUN = "Run the services"
LOOK = "Look after them"

app.command(rich_help_panel=TALK)(chat.chat)
app.command(rich_help_panel=TALK)(generate.generate)
app.command(rich_help_panel=TALK)(run.run)
app.command(rich_help_panel=TALK)(tokens.tokenize)
app.command(name="count-tokens", rich_help_panel=TALK)(tokens.count_tokens)
app.command(rich_help_panel=TALK)(compare.compare)
app.command(rich_help_panel=TEACH)(train.train)
app.add_typer(datasets.app, name="datasets", rich_help_panel=TEACH)
app.add_typer(jobs.app, name="jobs", rich_help_panel=TEACH)
app.add_typer(adapters.app, name="adapters", rich_help_panel=TEACH)
app.command(rich_help_panel=RUN)(up.up)
app.command(
    rich_help_panel=RUN,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(serve.serve)
app.add_typer(models.app, name="models", rich_help_panel=LOOK)
app.add_typer(tasks.app, name="tasks", rich_help_panel=LOOK)
app.command(rich_help_panel=LOOK)(status.status)
app.command(rich_help_panel=LOOK)(top.top)
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.add_typer(config.app, name="config", rich_help_panel=LOOK)
app.command(rich_help_panel=LOOK)(version.version)


def main() -> None:
    """Run the command line of this process; does not return."""
    # gRPC's own notes (a connection that was closed, and the like) are said better by the exceptions.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Not standalone: a wrong usage is one line, as every other failure is.
        result = app(prog_name=NAME, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except TyperException as error:
        _refuse(error)
    except typer.Abort:
        terminal.err.print("aborted")
        sys.exit(1)
    except SlipstreamClientError as error:
        terminal.print_failure(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader has gone (`| head`); nothing more can be said, not even by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # A file that cannot be written, a disk that is full.
        where = f"{error.filename}: " if error.filename else ""
        terminal.err.print(f"[bold red]error[/] {escape(where + (error.strerror or str(error)))}")
        sys.exit(1)


def _refuse(error: TyperException) -> NoReturn:
    """Say in one line what is wrong with the command, and where its options are listed."""
    context = getattr(error, "ctx", None)
    # Without a message the help has been shown in its place.
    if message := error.format_message().strip():
        path = context.command_path if context is not None else NAME
        terminal.err.print(f"[bold red]error[/] {escape(message)} [dim]({path} --help)[/]")
    sys.exit(error.exit_code)
