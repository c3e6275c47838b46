"""``aquiline generate``: prompts in, text out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from aquiline.cli import options
from aquiline.core.outputs import RequestOutput


def generate(
    model: options.Model = options.BUILT_IN,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts, one a line.")] = None,
    chat: Annotated[bool, typer.Option(help="Through the chat template, as a user's turn.")] = True,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end token.")] = False,
    speculate: options.Speculate = True,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    verification: options.Verification = "coupled",
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Generate text. One prompt streams; a file runs as one batch, answers in order."""
    prompts = options.read_prompts(prompt, file)
    llm = options.open_llm(model, dtype, draft, tree, verification, speculate, method)
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "max_tokens": max_tokens, "stop": tuple(stop or ()), "ignore_eos": ignore_eos,
    }  # fmt: skip
    params = llm.default_sampling_params(**{k: v for k, v in given.items() if v is not None})
    conversations = [[{"role": "user", "content": text}] for text in prompts]
    if len(prompts) == 1 and not json_output:
        for output in llm.stream(conversations[0] if chat else prompts[0], params):
            print(output.text_delta, end="", flush=True)
        print()
        return
    outputs = llm.chat(conversations, params) if chat else llm.generate(prompts, params)
    for text, output in zip(prompts, outputs, strict=True):
        print(json.dumps(as_record(text, output)) if json_output else output.outputs[0].text)


def as_record(prompt: str, output: RequestOutput) -> dict[str, object]:
    """One answer as a JSON object."""
    stats = dataclasses.asdict(output.speculation)
    stats["tokens_per_call"] = round(output.speculation.tokens_per_call, 4)
    return {"prompt": prompt, **dataclasses.asdict(output.outputs[0]), "speculation": stats}
