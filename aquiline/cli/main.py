"""The command line: one command a file; errors are one line on stderr and exit code 2."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from aquiline.cli import (
    bench,
    bench_serve,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    report,
    serve,
    train,
    tune,
)
from aquiline.core.errors import AquilineError

app = typer.Typer(
    help="Train EAGLE drafts for Llama-family models and run those models with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("data")(data.data)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("tune")(tune.tune)
benches = typer.Typer(help="Measure the engine, or a server.", no_args_is_help=True)
benches.command("latency")(bench.latency)
benches.command("serve")(bench_serve.serve)
app.add_typer(benches, name="bench")
app.command("report")(report.report)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the ``aquiline`` command."""
    try:
        app()
    except AquilineError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            "error:", str(error).replace("\n", " "), style="red", markup=False
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
