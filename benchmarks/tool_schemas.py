"""Schemas of real tool calls: does each compile, how fast, and what does a node's mask cost.

    pip install --no-deps bfcl-eval==2026.3.23      (Apache-2.0; read at run time, not shipped)
    python -m benchmarks.tool_schemas --model smollm2-135m-instruct
    python -m benchmarks.tool_schemas --engine --batch 64 --out benchmarks/results/tool_schemas.json
    python -m benchmarks.tool_schemas --engine --trees chain-3 tree-8 --limit 40

The package's requests each come with one function. Its types are those of Python, Java and
JavaScript; here they become JSON Schema. The text asked for is {"name": ..., "arguments": {...}}.
Masks are timed along texts that the grammar allows, each token with two siblings beside it: the
likeliest text is not known without a model, so the next token is drawn from those allowed.

``--engine`` has the model answer instead, 512 tokens at most, greedily and at T=0.8, plainly and
with its draft: how many answers are valid and how many cut at the limit, whether a seed's text is
plain decoding's, and tokens per call under the schema, under it without foresight, and of the same
prompts free. Where a text is not plain decoding's, the gap of the two leading perturbed logits that
the form allows tells why: up to 1e-3 is a near tie. All forms are compiled before, in parallel, for
all engines. The two ways of running share a file of results, a section each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import torch

from aquiline.core.errors import AquilineError, DataError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import CompletionOutput, RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.engine.loader import choose_device
from aquiline.guided.grammar import Grammar, Grammars, Spell, mask_words
from aquiline.guided.matcher import Matcher
from aquiline.models.llama import Llama
from aquiline.models.registry import resolve
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from benchmarks.common import stamp, write_section
from benchmarks.fp32_identity import TOLERANCE, Perturb, divergences
from benchmarks.seed_identity import perturbing

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


class Spelling:
    """A text's usual tokens; none with ``foresight`` off, so that nothing is foreseen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.foresight = tokenizer, True

    def __call__(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if self.foresight else ()


def grammars_of(tokenizer: Tokenizer, spell: Spell) -> Grammars:
    """Of a model whose vocabulary is its tokenizer's; nothing that was compiled is forgotten."""
    tokens, size = tokenizer.token_bytes(), tokenizer.vocab_size
    return Grammars(tokens, size, tokenizer.eos_token_ids, spell, cache_bytes=2**40)


def compile_all(store: Grammars, calls: Sequence[ToolCall], threads: int = 1) -> Compiled:
    def timed(call: ToolCall) -> tuple[Grammar | str, float]:
        start = time.perf_counter()
        try:
            done: Grammar | str = store.compile(StructuredOutput(json=call.schema))
        except AquilineError as error:
            done = str(error)
        return done, 1e3 * (time.perf_counter() - start)

    grammars, times, failures = {}, [], {}
    with ThreadPoolExecutor(threads) as pool:
        for call, (done, milliseconds) in zip(calls, pool.map(timed, calls), strict=True):
            if isinstance(done, str):
                failures[call.name] = done
            else:
                grammars[call.name] = done
                times.append(milliseconds)
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


def under_the_form(
    perturb: Perturb, grammars: Sequence[Grammar], prompts: Sequence[list[int]],
    texts: Sequence[tuple[int, ...]],
) -> Perturb:  # fmt: skip
    """What a draw compares after the beginning of a text: what the form forbids is at -inf."""

    def perturb_allowed(number: int, position: int, logits: torch.Tensor) -> torch.Tensor:
        matcher = Matcher(grammars[number])
        matcher.advance(texts[number][: position - len(prompts[number])])
        rows = torch.empty(1, mask_words(len(logits)), dtype=torch.int32)
        matcher.fill(TreeShape.chain(0), torch.zeros(1, dtype=torch.int64), rows)
        bits = (rows[0, :, None] >> torch.arange(32)) & 1
        allowed = bits.flatten()[: len(logits)].bool()
        return perturb(number, position, logits.masked_fill(~allowed, float("-inf")))

    return perturb_allowed


def through_engine(calls: Sequence[ToolCall], options: argparse.Namespace) -> dict[str, Any]:
    """Every call plainly, then under each tree, at every temperature."""
    tokenizer = load_tokenizer(resolve(options.model))
    spelling, started = Spelling(tokenizer), time.perf_counter()
    store = grammars_of(tokenizer, spelling)
    compiled = compile_all(store, calls, options.threads)
    compiling = time.perf_counter() - started
    print(f"{len(calls)} forms, {compiling:.1f} s, refused: {compiled.failures}", flush=True)
    calls = [call for call in calls if call.name in compiled.grammars]
    grammars = [compiled.grammars[call.name] for call in calls]
    prompts = [tokenizer.encode_chat(list(call.messages)) for call in calls]
    rows: list[dict[str, Any]] = []
    plain: dict[float, list[tuple[int, ...]]] = {}
    exact: Llama | None = None
    for tree, temperature in product((None, *options.trees), options.temperatures):
        if temperature == options.temperatures[0]:
            llm = LLM(
                options.model, options.dtype,
                None if tree is None else {"tree": tree, "model": options.draft},
                device=options.device, max_num_seqs=options.batch, max_model_len=options.context,
                max_num_batched_tokens=options.prefill,
                kv_cache_tokens=options.batch * options.context,
            )  # fmt: skip
            exact = exact or llm.engine.runner.models.target
            llm.engine.grammars = store
        base = SamplingParams(temperature=temperature, max_tokens=options.max_tokens)
        free = [replace(base, seed=seed) for seed in range(len(calls))]
        under = [
            replace(one, structured_outputs={"json": call.schema})
            for one, call in zip(free, calls, strict=True)
        ]
        guided, seconds = answers(llm, prompts, under)
        texts = [output.outputs[0].token_ids for output in guided]
        expected = plain.setdefault(temperature, texts)
        said = zip(guided, calls, strict=True)
        found = Counter(verdict(output.outputs[0], call.schema) for output, call in said)
        assert exact is not None
        perturb = under_the_form(perturbing(under), grammars, prompts, expected)
        apart = divergences(exact, None, prompts, texts, expected, perturb)
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        rows.append(
            {"tree": tree or "none", "temperature": temperature, "answers": len(calls),
             "verdicts": dict(found), "same_as_plain": same,
             "counted": len(calls) - same - sum(one.gap <= TOLERANCE for one in apart),
             "differences": [asdict(one) for one in apart], "tokens": sum(map(len, texts)),
             "seconds": round(seconds, 2), "tpc": tokens_per_call(guided)}
        )  # fmt: skip
        if tree is not None:
            rows[-1]["tpc_without_a_form"] = tokens_per_call(answers(llm, prompts, free)[0])
            spelling.foresight = False
            rows[-1]["tpc_without_foresight"] = tokens_per_call(answers(llm, prompts, under)[0])
            spelling.foresight = True
        print(rows[-1], flush=True)
    return {
        "model": options.model, "dtype": options.dtype, "batch": options.batch,
        "max_tokens": options.max_tokens, "compile_seconds": round(compiling, 2),
        "refused": compiled.failures, "ok": not any(row["counted"] for row in rows), "rows": rows,
    }  # fmt: skip


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
    parser.add_argument("--draft", help="its folder; the one that ships with the model if left out")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="rows of the engine")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of prompts in a step")
    parser.add_argument(
        "--threads", type=int, default=min(16, os.cpu_count() or 1), help="to compile with"
    )
    args = parser.parse_args()
    calls = list(tool_calls(args.data))
    if args.limit:
        calls = calls[:: max(1, len(calls) // args.limit)][: args.limit]
    if args.engine:
        section = {**through_engine(calls, args), **stamp(choose_device(args.device))}
        write_section(args.out, "engine", section)
    else:
        write_section(args.out, "schemas", {**schemas(calls, args), **stamp(torch.device("cpu"))})


def schemas(calls: Sequence[ToolCall], options: argparse.Namespace) -> dict[str, Any]:
    """Each compiled alone, and some of their masks timed."""
    tokenizer = load_tokenizer(resolve(options.model))
    compiled = compile_all(grammars_of(tokenizer, Spelling(tokenizer)), calls)
    chance = random.Random(0)
    timed = chance.sample(sorted(compiled.grammars), min(options.texts, len(compiled.grammars)))
    masks = [us for name in timed for us in mask_microseconds(compiled.grammars[name], chance, 128)]
    for name, reason in compiled.failures.items():
        print(f"{name}: {reason}")
    return {
        "schemas": len(calls), "compiled": len(compiled.grammars),
        "failures": compiled.failures, "vocabulary": tokenizer.vocab_size,
        "compile_ms": quantiles(compiled.milliseconds), "mask_us_a_node": quantiles(masks),
    }  # fmt: skip


if __name__ == "__main__":
    main()
