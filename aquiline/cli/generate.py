"""``aquiline generate``: prompts in, text out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from aquiline.cli import options
from aquiline.core.errors import AquilineError
from aquiline.core.outputs import CompletionOutput, RequestOutput


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
    n: Annotated[int | None, typer.Option(help="Texts for each prompt.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Tokens before a text may end.")] = None,
    presence_penalty: options.Penalty = None,
    frequency_penalty: options.Penalty = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="For tokens of prompt and text, by factor; 1 is none.")
    ] = None,
    logit_bias: Annotated[
        str | None, typer.Option(help='Added to logits, JSON by token id: {"5": -2.5}.')
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and of so many likeliest.")
    ] = None,
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
    """Generate text. One prompt streams; a file runs as one batch, answers in order. Several texts
    for a prompt follow each other."""
    if logprobs is not None and not json_output:
        raise AquilineError(f"--logprobs {logprobs}: they are shown with --json; add it")
    prompts = options.read_prompts(prompt, file)
    llm = options.open_llm(model, dtype, draft, tree, verification, speculate, method)
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "max_tokens": max_tokens, "stop": tuple(stop or ()), "ignore_eos": ignore_eos,
        "n": n, "min_tokens": min_tokens, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "repetition_penalty": repetition_penalty,
        "logit_bias": None if logit_bias is None else _bias(logit_bias), "logprobs": logprobs,
    }  # fmt: skip
    params = llm.default_sampling_params(**{k: v for k, v in given.items() if v is not None})
    conversations = [[{"role": "user", "content": text}] for text in prompts]
    if len(prompts) == params.n == 1 and not json_output:
        for output in llm.stream(conversations[0] if chat else prompts[0], params):
            print(output.text_delta, end="", flush=True)
        print()
        return
    outputs = llm.chat(conversations, params) if chat else llm.generate(prompts, params)
    for text, output in zip(prompts, outputs, strict=True):
        for choice in output.outputs:
            print(json.dumps(as_record(text, output, choice)) if json_output else choice.text)


def as_record(prompt: str, output: RequestOutput, choice: CompletionOutput) -> dict[str, object]:
    """One answer as a JSON object; its statistics are those of all choices."""
    stats = dataclasses.asdict(output.speculation)
    stats["tokens_per_call"] = round(output.speculation.tokens_per_call, 4)
    return {"prompt": prompt, **dataclasses.asdict(choice), "speculation": stats}


def _bias(text: str) -> dict[int, float]:
    """``--logit-bias``: a JSON object whose keys are token ids."""
    try:
        return {int(token): value for token, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise AquilineError(
            f'--logit-bias {text}: give a JSON object by token id, such as {{"5": -2.5}}'
        ) from None
