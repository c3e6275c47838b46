"""Schemas of real tool calls: does each compile, how fast, and what does a node's mask cost.

    pip install --no-deps bfcl-eval==2026.3.23      (Apache-2.0; read at run time, not shipped)
    python -m benchmarks.tool_schemas --model smollm2-135m-instruct
    python -m benchmarks.tool_schemas --engine --trees chain-3 tree-8 --limit 40

The package's requests each come with one function. Its types are those of Python, Java and
JavaScript; here they become JSON Schema. The text asked for is {"name": ..., "arguments": {...}}.
Masks are timed along texts that the grammar allows, each token with two siblings beside it: the
likeliest text is not known without a model, so the next token is drawn from those allowed.

``--engine`` has the model answer instead, 512 tokens at most, plainly and with its draft: how many
answers are valid and how many cut at the limit, whether a seed's text is plain decoding's (fp32),
and tokens per call under the schema, under it without foresight, and of the same prompts free.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import torch

from aquiline.core.errors import AquilineError, DataError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import CompletionOutput, RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.guided.grammar import Grammar, Grammars, Spell, mask_words
from aquiline.guided.matcher import Matcher
from aquiline.models.registry import resolve
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from benchmarks.common import stamp, write_result

FILES = ("simple_python", "live_simple", "simple_java", "simple_javascript")
_REMEDY = "pip install --no-deps bfcl-eval==2026.3.23"
_TYPES = {
    "dict": "object", "HashMap": "object", "float": "number", "double": "number",
    "long": "integer", "tuple": "array", "Array": "array", "ArrayList": "array",
    "String": "string", "char": "string", "Boolean": "boolean", "any": None, "": None,
    **{name: name for name in ("string", "integer", "boolean", "array", "number", "object")},
}  # fmt: skip
_KEPT = ("description", "enum", "format", "minimum", "maximum")
TREE = TreeShape.of([[0], [1], [2]])


@dataclass(frozen=True)
class ToolCall:
    """A request with the function that answers it.

    Attributes:
        messages: the conversation, the function's definition in front.
        schema: of the call: {"name": ..., "arguments": ...}.
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any]


def tool_calls(data: Path | None = None) -> Iterator[ToolCall]:
    """Every request with one function, in the order of the files.

    Args:
        data: the folder of the ``BFCL_v4_*.json`` files; None: the installed package's.

    Raises:
        DataError: the package is not installed, or not laid out as expected.
    """
    folder = data or _installed()
    for file in (folder / f"BFCL_v4_{name}.json" for name in FILES):
        if not file.is_file():
            raise DataError(f"{file}: not found; {_REMEDY}")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield _tool_call(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file}: line {number}: {error}; {_REMEDY}") from None


def _installed() -> Path:
    spec = find_spec("bfcl_eval")
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder) / "data"
    raise DataError(f"bfcl_eval: not installed; {_REMEDY}")


def _tool_call(record: Mapping[str, Any]) -> ToolCall:
    (function,) = record["function"]
    arguments = json_schema(function["parameters"])
    system = "Answer with one call of this function, as JSON with name and arguments:\n"
    told = {"name": function["name"], "description": function["description"]}
    system += json.dumps(told | {"parameters": arguments})
    schema = {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
    }
    messages = [m for m in record["question"][0] if m["role"] != "system"]
    return ToolCall(record["id"], ({"role": "system", "content": system}, *messages), schema)


def json_schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's description as JSON Schema; ``default`` and ``optional`` assert nothing."""
    kind = _TYPES[node.get("type", "")]
    schema = {key: node[key] for key in _KEPT if key in node}
    if kind is not None:
        schema["type"] = kind
    if kind == "array" and "items" in node:
        schema["items"] = json_schema(node["items"])
        if "enum" in schema:  # the values of an array's items, none of which is an array
            schema["items"]["enum"] = schema.pop("enum")
    if kind == "object" and "properties" in node:
        schema["properties"] = {k: json_schema(v) for k, v in node["properties"].items()}
        schema["required"] = list(node.get("required", ()))
    return schema


@dataclass(frozen=True)
class Compiled:
    """What became of the schemas: milliseconds of each that compiled, the error of each other."""

    grammars: dict[str, Grammar]
    milliseconds: tuple[float, ...]
    failures: dict[str, str]


def grammars_of(tokenizer: Tokenizer, spell: Spell) -> Grammars:
    """Of a model whose vocabulary is its tokenizer's."""
    tokens, size = tokenizer.token_bytes(), tokenizer.vocab_size
    return Grammars(tokens, size, tokenizer.eos_token_ids, spell)


def compile_all(store: Grammars, calls: Sequence[ToolCall]) -> Compiled:
    grammars, times, failures = {}, [], {}
    for call in calls:
        start = time.perf_counter()
        try:
            grammars[call.name] = store.compile(StructuredOutput(json=call.schema))
            times.append(1e3 * (time.perf_counter() - start))
        except AquilineError as error:
            failures[call.name] = str(error)
    return Compiled(grammars, tuple(times), failures)


def mask_microseconds(grammar: Grammar, chance: random.Random, limit: int) -> list[float]:
    """Microseconds a node of a root with three children, at each token of a random text."""
    rows = torch.empty(TREE.size, mask_words(grammar.vocab_size), dtype=torch.int32)
    matcher, times = Matcher(grammar), []
    tokens = torch.zeros(TREE.size, dtype=torch.int64)
    for _ in range(limit):
        matcher.fill(TREE, tokens, rows)
        row = rows[0].numpy().view("uint8")
        allowed = torch.from_numpy(row).unsqueeze(1).bitwise_right_shift(torch.arange(8)) & 1
        choices = allowed.flatten().nonzero().flatten().tolist()
        tokens[1:] = torch.tensor(chance.choices(choices, k=TREE.size - 1))
        start = time.perf_counter()
        matcher.fill(TREE, tokens, rows)
        times.append(1e6 * (time.perf_counter() - start) / TREE.size)
        matcher.advance([int(tokens[1])])
        if matcher.finished:
            break
    return times


def verdict(choice: CompletionOutput, schema: Mapping[str, Any]) -> str:
    """ "valid", "cut" at the limit, or what is wrong: the first line of it."""
    if choice.finish_reason != "stop":
        return "cut" if choice.finish_reason == "length" else str(choice.finish_reason)
    try:
        jsonschema.validate(json.loads(choice.text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return "valid"


def answers(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> tuple[list[RequestOutput], float]:
    """What is said, and seconds."""
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return outputs, time.perf_counter() - started


def tokens_per_call(outputs: Sequence[RequestOutput]) -> float:
    """Of all rounds together."""
    rounds = sum(output.speculation.rounds for output in outputs)
    return round(sum(output.speculation.tokens for output in outputs) / max(rounds, 1), 4)


def through_engine(calls: Sequence[ToolCall], options: argparse.Namespace) -> dict[str, Any]:
    """Every call plainly, then under each tree."""
    base = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    free = [replace(base, seed=seed) for seed in range(len(calls))]
    under = [
        replace(one, structured_outputs={"json": call.schema})
        for one, call in zip(free, calls, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    plain: list[tuple[int, ...]] = []
    for tree in (None, *options.trees):
        config = None if tree is None else {"tree": tree}
        llm = LLM(options.model, options.dtype, config, max_num_seqs=options.batch)
        prompts = [llm.tokenizer.encode_chat(list(call.messages)) for call in calls]
        guided, seconds = answers(llm, prompts, under)
        texts = [output.outputs[0].token_ids for output in guided]
        plain = plain or texts
        found = Counter(
            verdict(output.outputs[0], call.schema)
            for output, call in zip(guided, calls, strict=True)
        )
        rows.append(
            {"tree": tree or "none", "answers": len(calls), "verdicts": dict(found),
             "same_as_plain": sum(a == b for a, b in zip(texts, plain, strict=True)),
             "tokens": sum(map(len, texts)), "seconds": round(seconds, 2),
             "tpc": tokens_per_call(guided)}
        )  # fmt: skip
        if tree is not None:
            rows[-1]["tpc_without_a_form"] = tokens_per_call(answers(llm, prompts, free)[0])
            llm.engine.grammars = grammars_of(llm.tokenizer, lambda _: ())
            rows[-1]["tpc_without_foresight"] = tokens_per_call(answers(llm, prompts, under)[0])
        print(rows[-1], flush=True)
    return {"temperature": options.temperature, "dtype": options.dtype, "rows": rows}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    named = {"median": statistics.median(ordered), "p99": p99, "max": ordered[-1]}
    return {name: round(value, 3) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--data", type=Path, help="folder of the BFCL_v4_*.json files")
    parser.add_argument("--texts", type=int, default=50, help="schemas whose masks are timed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", action="store_true", help="have the model answer")
    parser.add_argument("--limit", type=int, help="calls, spread over all of them")
    parser.add_argument("--trees", nargs="+", default=["chain-3"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8, help="rows of the engine")
    args = parser.parse_args()
    if args.engine:
        calls = list(tool_calls(args.data))
        calls = calls[:: max(1, len(calls) // (args.limit or len(calls)))][: args.limit]
        write_result(args.out, {"model": args.model, **through_engine(calls, args), **stamp()})
        return
    tokenizer = load_tokenizer(resolve(args.model))
    store = grammars_of(tokenizer, tokenizer.encode)
    calls = list(tool_calls(args.data))
    compiled = compile_all(store, calls)
    chance = random.Random(0)
    timed = chance.sample(sorted(compiled.grammars), min(args.texts, len(compiled.grammars)))
    masks = [us for name in timed for us in mask_microseconds(compiled.grammars[name], chance, 128)]
    for name, reason in compiled.failures.items():
        print(f"{name}: {reason}")
    write_result(
        args.out,
        {
            "schemas": len(calls), "compiled": len(compiled.grammars),
            "failures": compiled.failures, "vocabulary": tokenizer.vocab_size,
            "compile_ms": quantiles(compiled.milliseconds), "mask_us_a_node": quantiles(masks),
            **stamp(torch.device("cpu")),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
