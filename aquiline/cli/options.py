"""Options that several commands share, and how a speculation is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aquiline.core.errors import AquilineError
from aquiline.engine.llm import LLM
from aquiline.models.registry import shipped_draft

BUILT_IN = "smollm2-135m-instruct"

Model = Annotated[str, typer.Argument(help="Built-in name, Hugging Face folder or GGUF file.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")]
Draft = Annotated[str | None, typer.Option(help="Folder of a draft; default: the one shipped.")]
Method = Annotated[str, typer.Option(help="The draft's wiring: eagle (EAGLE-1) or eagle3.")]
Tree = Annotated[
    str | None, typer.Option(help="chain-N, a pool name, or paths as JSON; default: chain-3.")
]
Verification = Annotated[str, typer.Option(help="coupled, multi-round; or a baseline.")]
Retrieval = Annotated[int, typer.Option(help="Nodes that continue the request's own text.")]
Speculate = Annotated[bool, typer.Option(help="Decode with a draft.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the checkpoint's.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus mass, in (0, 1].")]
Penalty = Annotated[float | None, typer.Option(help="From -2 to 2; for tokens of the text.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def speculative_config(
    model: str,
    draft: str | None,
    tree: str | None,
    verification: str,
    method: str = "eagle",
    retrieval: int = 0,
) -> dict[str, Any] | None:
    """The mapping that LLM takes; None (plain) where there is no draft for the model."""
    if draft is None and shipped_draft(model) is None:
        return None
    config: dict[str, Any] = {"method": method, "model": draft, "verification": verification}
    config["retrieval"] = retrieval
    if tree is not None:
        try:
            config["tree"] = json.loads(tree) if tree.startswith("[") else tree
        except json.JSONDecodeError:
            raise AquilineError(
                f"--tree {tree}: not JSON; give paths such as [[0],[1],[0,0]]"
            ) from None
    return config


def open_llm(
    model: str,
    dtype: str,
    draft: str | None,
    tree: str | None,
    verification: str,
    speculate: bool,
    method: str,
) -> LLM:
    """An LLM from the shared options; without a draft to be had it decodes plainly."""
    config = None
    if speculate:
        config = speculative_config(model, draft, tree, verification, method)
    return LLM(model, dtype, config)  # type: ignore[arg-type]


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """One prompt from the option, or one a line from a file."""
    if (prompt is None) == (file is None):
        raise AquilineError("--prompt: give a prompt, or a file with one prompt a line (--file)")
    if prompt is not None:
        return [prompt]
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AquilineError(f"--file {file}: {error}; give a UTF-8 text file") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise AquilineError(f"--file {file}: it has no prompt; give one a line")
    return prompts
