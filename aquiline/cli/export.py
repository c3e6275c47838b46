"""``aquiline export``: a draft in the layout of the engine that will run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.core.errors import AquilineError
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft_checkpoint import build_draft
from aquiline.models.draft_export import DraftFormat, export_draft, target_shell
from aquiline.models.draft_files import DraftFiles, read_draft
from aquiline.models.registry import resolve

FORMATS: tuple[DraftFormat, ...] = get_args(DraftFormat)
DTYPES = ("float32", "float16", "bfloat16")


def export(
    draft: Annotated[Path, typer.Argument(help="Folder of a draft, in any layout.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    target: Annotated[str, typer.Option(help="The draft's target.")] = options.BUILT_IN,
    form: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; default by wiring.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: as it is stored.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Write a draft for vLLM, SGLang or the EAGLE repository, load it back and compare."""
    files = read_draft(draft)
    chosen = _format(form, files)
    shell = target_shell(open_checkpoint(resolve(target)))
    loaded = build_draft(files, shell, 1)
    stored = _dtype(dtype, files)
    export_draft(loaded, shell, out, chosen, stored, target)
    name = str(stored).removeprefix("torch.")
    Console(stderr=json_output, highlight=False).print(
        f"{draft} -> {out}: {chosen}, {name}, loaded back and equal", soft_wrap=True
    )
    if json_output:
        print(json.dumps({"out": str(out), "format": chosen, "dtype": name}))


def _format(name: str | None, files: DraftFiles) -> DraftFormat:
    if name is None:
        return files.method
    for form in FORMATS:
        if form == name:
            return form
    raise AquilineError(f"--format {name}: give one of {', '.join(FORMATS)}")


def _dtype(name: str | None, files: DraftFiles) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise AquilineError(f"--dtype {name}: give one of {', '.join(DTYPES)}")
    found: torch.dtype = files.tensors["fc.weight"].dtype if name is None else getattr(torch, name)
    return found
