"""The teacher of transformers: the same as ours on a Llama, and right on what is no Llama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.draft_checkpoint import load_draft
from aquiline.training.packing import PackedBatch, Packer
from aquiline.training.progress import Progress
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.trainer import Trainer
from aquiline.training.transformers_teacher import TransformersTeacher, read_shape
from tests.tiny_checkpoint import VOCAB
from tests.training.tiny_run import BATCH, CPU, Setting

TAPS = (0, 1, 2)  # of two layers: the embedding, between, the output before the final norm


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("teacher"))


def batch_of(setting: Setting) -> PackedBatch:
    return Packer(setting.corpus, BATCH, 0, 6).batch(0)


def test_llama_gives_what_ours_gives(setting: Setting) -> None:
    theirs = TransformersTeacher.load(setting.folder, torch.float32, CPU)
    ours = LlamaTeacher(setting.target())
    assert theirs.packed
    assert theirs.config == ours.config
    batch = batch_of(setting)
    a, b = theirs(batch, TAPS), ours(batch, TAPS)
    torch.testing.assert_close(a.features, b.features, rtol=1e-5, atol=1e-5)
    for mine, other in zip(a.taps, b.taps, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert theirs.head_weight.equal(ours.head_weight)
    assert theirs.embed(batch.tokens).equal(ours.embed(batch.tokens))


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "eos_token_id": 1,
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-NeoX": ("GPTNeoX", {}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "Mistral with a window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "GPT-2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "Gemma 3": ("Gemma3Text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "Bloom, biased by distance": ("Bloom", {"n_layer": 3, "n_head": 4}),
}


def other(name: str) -> Any:
    kind, more = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_packed_documents_do_not_see_each_other(name: str, setting: Setting) -> None:
    teacher = TransformersTeacher(other(name))
    assert teacher.packed == (name != "Bloom, biased by distance")
    batch = batch_of(setting)
    together = teacher(batch, (1, 3))
    teacher.packed = False
    teacher.causal.set_attn_implementation("eager")
    alone = teacher(batch, (1, 3))
    # Rounding differs between attentions; the scale of the features is about 1.
    torch.testing.assert_close(together.features, alone.features, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(together.taps, alone.taps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_draft_for_another_architecture_is_trained_and_exported(
    method: str, setting: Setting, tmp_path: Path
) -> None:
    packer = Packer(setting.corpus, BATCH, 0, 6)
    config = replace(
        setting.config, teacher="transformers", method=method, tokens=4 * BATCH, warmup_tokens=0,
        eval_every=2, log_every=2,
    )  # fmt: skip
    teacher = TransformersTeacher(other_with_layers(8))
    seen: list[Progress] = []
    run = Trainer(config, teacher, setting.tokenizer, packer)
    finished = run.run(tmp_path, seen.append)
    assert [one.step for one in seen] == [2, 4]
    assert seen[1].loss < seen[0].loss
    assert finished.best is None, "the decoder cannot run it, so nothing is measured"
    target = setting.target()
    if method == "eagle":
        load_draft(tmp_path / "draft", target, 200)


def other_with_layers(layers: int) -> Any:
    config = transformers.GPTNeoXConfig(**{**SIZES, "num_hidden_layers": layers})
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(config)


def test_a_head_that_is_no_matrix_is_refused(setting: Setting) -> None:
    model = other("Qwen3")
    good = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = good(*args, **kwargs)
        out.logits = cap(out.logits)
        return out

    def cap(logits: Tensor) -> Tensor:
        return 2 * torch.tanh(logits / 2)

    model.forward = capped
    with pytest.raises(CheckpointError, match="a bias, a cap or a scale"):
        TransformersTeacher(model)


def test_what_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(CheckpointError, match="transformers cannot"):
        read_shape(tmp_path)
    with pytest.raises(CheckpointError, match="transformers cannot"):
        TransformersTeacher.load(tmp_path, torch.float32, CPU)
