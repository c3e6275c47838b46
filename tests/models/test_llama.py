"""The target computes what transformers computes, for every kind of checkpoint it accepts."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from aquiline.attention.packed import PackedAttention
from aquiline.attention.paged import PagedAttention, TreePlan
from aquiline.core.errors import CheckpointError
from aquiline.distributed.ranks import Ranks
from aquiline.kvcache.pool import KVPlane
from aquiline.layers.linear import ColumnParallelLinear, RowParallelLinear
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.llama import Llama, TargetOutput, load_llama
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4}),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": 90}),  # as long as the text
}
# As published with HuggingFaceTB/SmolLM2-135M-Instruct.
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
TOKENS = torch.randint(60, (1, 90), generator=torch.Generator().manual_seed(0))


def reference(kind: str) -> Any:
    """A random transformers model; every norm and bias is random too."""
    model_type, changes = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "tie_word_embeddings": False, **changes,
        },
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def load(folder: Path, ranks: Ranks = Ranks()) -> Llama:  # noqa: B008
    return load_llama(open_checkpoint(folder), torch.float32, CPU, 256, ranks)


@torch.inference_mode()
def paged(model: Llama, tokens: Tensor, taps: tuple[int, ...] = ()) -> TargetOutput:
    """One prefill through pages of 16 slots, handed out in reverse."""
    count = tokens.shape[1]
    pages = -(-count // 16)
    plane = KVPlane(model.plane_shape(), (pages + 1) * 16, 16, torch.float32, CPU)
    table = torch.arange(pages, 0, -1)[None]
    slots = (table[0, torch.arange(count) // 16] * 16 + torch.arange(count) % 16)[None]
    attention = PagedAttention(plane, TreePlan(table, torch.tensor([0]), slots, count))
    return model(tokens, torch.arange(count)[None], attention, taps)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_taps_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS, output_hidden_states=True)
    out = paged(ours, TOKENS, (0, 1, 2, 3))
    torch.testing.assert_close(ours.logits(out.features), expected.logits, rtol=0, atol=1e-5)
    assert len(out.taps) == 4
    for tap, hidden in zip(out.taps[:3], expected.hidden_states[:3], strict=True):
        torch.testing.assert_close(tap, hidden, rtol=1e-5, atol=1e-5)
    # transformers' last hidden state is normed, our last tap is not.
    last = expected.hidden_states[3]
    torch.testing.assert_close(ours.norm(out.taps[3]), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.features, last, rtol=1e-5, atol=1e-5)
    assert paged(ours, TOKENS, (2,)).taps[0].equal(out.taps[2])


def test_a_text_longer_than_the_window_would_differ(tmp_path: Path) -> None:
    """So the context is bounded by it, and the bound is tight."""
    theirs = reference("mistral-window")
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.context == 90
    longer = torch.cat((TOKENS, TOKENS[:, :1]), dim=1)
    with torch.no_grad():
        expected = theirs(longer).logits
    logits = ours.logits(paged(ours, longer).features)
    torch.testing.assert_close(logits[:, :90], expected[:, :90], rtol=0, atol=1e-5)
    assert (logits[:, 90] - expected[:, 90]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama-3.1", "qwen2", "mistral"])
def test_training_attention_gives_each_document_its_own_logits(kind: str, tmp_path: Path) -> None:
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    edges, positions = [0, 30, 31, 90], [*range(30), 0, *range(59)]
    attention = PackedAttention(torch.tensor(edges, dtype=torch.int32), 59)
    with torch.no_grad():
        logits = ours.logits(ours(TOKENS, torch.tensor([positions]), attention).features)
        for start, end in itertools.pairwise(edges):
            expected = theirs(TOKENS[:, start:end]).logits
            torch.testing.assert_close(logits[:, start:end], expected, rtol=0, atol=1e-5)


def test_built_in_model_equals_transformers() -> None:
    path = resolve("smollm2-135m-instruct")
    prompt = load_tokenizer(path).encode_chat([{"role": "user", "content": "Name two rivers."}])
    tokens = torch.tensor([prompt])
    config = AutoConfig.for_model("llama", **SMOLLM2)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rotary = theirs.model.rotary_emb
    theirs.to_empty(device=CPU)
    theirs.model.rotary_emb = type(rotary)(config)
    missing, unexpected = theirs.load_state_dict(
        dict(open_checkpoint(path).tensors()), strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    with torch.no_grad():
        expected = theirs(tokens).logits
    del theirs
    ours = load_llama(open_checkpoint(path), torch.float32, CPU, 256)
    logits = ours.logits(paged(ours, tokens).features)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    reference("qwen2").save_pretrained(folder)
    return folder


DAMAGE = {
    "missing": ("model.layers.1.self_attn.k_proj.bias", "is missing"),
    "norm missing": ("model.norm.weight", "is missing"),
    "head missing": ("lm_head.weight", "is missing"),
    "unknown": ("model.layers.1.self_attn.q_norm.weight", "has no place"),
    "misshaped": ("model.layers.2.mlp.up_proj.weight", "has shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensor_that_does_not_fit_is_refused_by_name(
    damage: str, stored: Path, tmp_path: Path
) -> None:
    name, message = DAMAGE[damage]
    weights = load_file(stored / "model.safetensors")
    if message == "is missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(5, 32)
    (tmp_path / "config.json").write_text((stored / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' {message}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


class LocalRanks(Ranks):
    """A rank whose collectives stay with it."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def test_column_parallel_parts_concatenate_and_row_parallel_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 8, generator=generator)
    weights = [torch.randn(rows, 8, generator=generator) for rows in (12, 4)]
    biases = [torch.randn(rows, generator=generator) for rows in (12, 4)]
    down = torch.randn(6, 8, generator=generator)
    ranks = [LocalRanks(rank, 2) for rank in range(2)]
    columns = [ColumnParallelLinear(8, (12, 4), True, r) for r in (Ranks(), *ranks)]
    rows = [RowParallelLinear(8, 6, r) for r in (Ranks(), *ranks)]
    for column in columns:
        for index in range(2):
            column.load(index, weights[index], biases[index])
    for row in rows:
        row.load(down)
    whole, *parts = (column(x) for column in columns)
    assert [part.shape[-1] for part in parts] == [8, 8]
    for index in range(2):
        sharded = [part[..., c.part(index)] for c, part in zip(columns[1:], parts, strict=True)]
        torch.testing.assert_close(torch.cat(sharded, -1), whole[..., columns[0].part(index)])
    halves = x.chunk(2, dim=-1)
    nothing = torch.zeros(2, 5, 6)
    total = sum(row(half, nothing, None).x for row, half in zip(rows[1:], halves, strict=True))
    torch.testing.assert_close(total, rows[0](x, nothing, None).x)
    with pytest.raises(ValueError, match="out_features=5 does not divide"):
        ColumnParallelLinear(8, (5,), ranks=Ranks(0, 2))


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def meet(self, x: Tensor) -> list[Tensor]:
        box, barrier = self.group  # type: ignore[misc]
        box[self.rank] = x
        barrier.wait()
        parts = [box[rank] for rank in range(self.size)]
        barrier.wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.meet(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meet(x), dim=-1)


@pytest.mark.parametrize("kind", ["llama-3.1", "llama-3.2", "qwen2", "qwen2-tied", "mistral"])
def test_two_ranks_compute_what_one_does(kind: str, tmp_path: Path) -> None:
    reference(kind).save_pretrained(tmp_path)
    whole = load(tmp_path)
    expected = whole.logits(paged(whole, TOKENS).features)
    group = ({}, threading.Barrier(2, timeout=30))
    models = [load(tmp_path, ThreadRanks(rank, 2, group)) for rank in range(2)]  # type: ignore[arg-type]
    assert models[0].plane_shape().kv_heads == 1
    results: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        with torch.inference_mode():
            results[rank] = models[rank].logits(paged(models[rank], TOKENS).features)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        torch.testing.assert_close(results[rank], expected, rtol=0, atol=1e-5)
