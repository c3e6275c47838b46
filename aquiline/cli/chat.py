"""``aquiline chat``: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.cli.colour import DEPTH_STYLES


def chat(
    model: options.Model = options.BUILT_IN,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    speculate: options.Speculate = True,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    verification: options.Verification = "coupled",
    dtype: options.Dtype = "auto",
) -> None:
    """Chat. An empty line or end of input leaves; /clear forgets the conversation."""
    llm = options.open_llm(model, dtype, draft, tree, verification, speculate, method)
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "max_tokens": max_tokens,
    }  # fmt: skip
    params = llm.default_sampling_params(**{k: v for k, v in given.items() if v is not None})
    console = Console(highlight=False)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        answer, stats = "", None
        for output in llm.stream(messages, params):
            depth = output.speculation.depths[-2:-1] or (0,)
            style = DEPTH_STYLES[min(depth[0], len(DEPTH_STYLES) - 1)]
            console.print(output.text_delta, end="", style=style, markup=False, soft_wrap=True)
            answer, stats = output.outputs[0].text, output.speculation
        console.print()
        if stats is not None and stats.accepted_by_depth:
            console.print(f"{stats.tokens_per_call:.2f} tokens per call", style="dim")
        messages.append({"role": "assistant", "content": answer})
