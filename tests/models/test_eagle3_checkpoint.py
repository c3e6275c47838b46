"""EAGLE-3 folders: the public layout and speculators', there and back; the rest refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.config import RopeScaling
from aquiline.models.draft import DraftHead, EagleDraft
from aquiline.models.draft_checkpoint import load_draft, save_draft
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head, random_eagle3
from aquiline.models.llama import Llama
from tests.tiny_checkpoint import VOCAB, make_draft, make_eagle3, tiny_config, write_draft

LAYERS, ROWS, D = 8, 40, 32  # of the target; of the draft's vocabulary; the width
TAPS = (2, 4, 5)


def layer_keys(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (32, width),
        f"{prefix}.self_attn.k_proj.weight": (16, width),
        f"{prefix}.self_attn.v_proj.weight": (16, width),
        f"{prefix}.self_attn.o_proj.weight": (D, 32),
        f"{prefix}.mlp.gate_proj.weight": (48, D),
        f"{prefix}.mlp.up_proj.weight": (48, D),
        f"{prefix}.mlp.down_proj.weight": (D, 48),
        f"{prefix}.hidden_norm.weight": (D,),
        f"{prefix}.input_layernorm.weight": (D,),
        f"{prefix}.post_attention_layernorm.weight": (D,),
    }


def public_shapes(layers: int = 1, first: str = "midlayer") -> dict[str, tuple[int, ...]]:
    shapes = {
        "fc.weight": (D, 3 * D),
        **layer_keys(first, 2 * D),
        "norm.weight": (D,),
        "lm_head.weight": (ROWS, D),
        "d2t": (ROWS,),
        "t2d": (VOCAB,),
    }
    for index in range(1, layers):
        shapes |= layer_keys(f"layers.{index}", D)
    return shapes


def public_tensors(layers: int = 1, first: str = "midlayer") -> dict[str, Tensor]:
    """As a public checkpoint stores them; every sixth token has a row."""
    torch.manual_seed(3)
    tensors = {name: torch.randn(shape) for name, shape in public_shapes(layers, first).items()}
    ids = 6 * torch.arange(ROWS)
    tensors["d2t"] = ids - torch.arange(ROWS)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    for index in range(1, layers):
        name = f"layers.{index}.hidden_norm.weight"
        tensors[name] = tensors[f"layers.{index}.input_layernorm.weight"].clone()
    return tensors


def public_config(layers: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": layers, "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB, "draft_vocab_size": ROWS, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "torch_dtype": "float16", **changes,
    }  # fmt: skip


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def target() -> Llama:
    torch.manual_seed(0)
    scaling = RopeScaling("factors", factors=(1.0, 1.0, 2.0, 8.0))
    config = tiny_config(layers=LAYERS, rope_theta=5e5, rope_scaling=scaling)
    return Llama(config, 64).requires_grad_(False)


def load(folder: Path, target: Llama) -> tuple[Eagle3Draft, Eagle3Head]:
    loaded = load_draft(folder, target, 64, "eagle3")
    assert isinstance(loaded.draft, Eagle3Draft)
    assert isinstance(loaded.head, Eagle3Head)
    return loaded.draft, loaded.head


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("first", ["midlayer", "layers.0"])
def test_public_keys_fill_every_parameter(
    layers: int, first: str, tmp_path: Path, target: Llama
) -> None:
    tensors = public_tensors(layers, first)
    write(tmp_path, tensors, public_config(layers))
    draft, head = load(tmp_path, target)
    assert (draft.taps, draft.feature_size) == (TAPS, 3 * D)
    assert draft.plane_shape().layers == layers
    assert head.token_ids is not None
    assert head.token_ids.tolist() == list(range(0, 6 * ROWS, 6))
    assert head.to_target(torch.tensor([[2, 0]])).tolist() == [[12, 0]]
    held = sum(p.numel() for module in (draft, head) for p in module.parameters())
    stored = sum(t.numel() for name, t in tensors.items() if name not in ("d2t", "t2d"))
    assert held == stored - (layers - 1) * D  # one norm of the later layers is stored twice
    assert torch.equal(draft.midlayer.self_attn.qkv_proj.weight[:32],
                       tensors[f"{first}.self_attn.q_proj.weight"])  # fmt: skip
    assert torch.equal(head.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(draft.midlayer.hidden_norm.weight, tensors[f"{first}.hidden_norm.weight"])
    assert not any(p.requires_grad for module in (draft, head) for p in module.parameters())
    assert load_draft(tmp_path, target, 64).draft.taps == TAPS  # found by its keys


@pytest.mark.parametrize("layers", [1, 3])
def test_round_trip(layers: int, tmp_path: Path, target: Llama) -> None:
    config = write(tmp_path, public_tensors(layers), public_config(layers))
    draft, head = load(config, target)
    (tmp_path / "again").mkdir()
    save_draft(tmp_path / "again", draft, head, target.embed_tokens.weight, torch.float32)
    stored = load_file(tmp_path / "again/model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        **public_shapes(layers), "embed_tokens.weight": (VOCAB, D)
    }  # fmt: skip
    for name, tensor in public_tensors(layers).items():
        assert torch.equal(stored[name], tensor), name
    assert (stored["d2t"].dtype, stored["t2d"].dtype) == (torch.int64, torch.bool)
    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert saved["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert saved["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert saved["norm_before_residual"] is False
    assert saved["draft_vocab_size"] == ROWS
    assert saved["max_position_embeddings"] == 256
    again, again_head = load(tmp_path / "again", target)
    assert again.config == draft.config
    assert again_head.embed_tokens is None
    for ours, theirs in ((draft, again), (head, again_head)):
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other), name


def test_whole_vocabulary_needs_no_maps(tmp_path: Path, target: Llama) -> None:
    tensors = public_tensors()
    del tensors["d2t"], tensors["t2d"]
    tensors["lm_head.weight"] = torch.randn(VOCAB, D)
    config = public_config()
    del config["draft_vocab_size"]
    _, head = load(write(tmp_path, tensors, config), target)
    assert head.token_ids is None
    draft, head = make_eagle3(layers=1)
    save_draft(tmp_path, draft, head, None, torch.float32)
    assert not {"d2t", "t2d"} & load_file(tmp_path / "model.safetensors").keys()
    assert load(tmp_path, target)[1].token_ids is None


def test_speculators_layout(tmp_path: Path, target: Llama) -> None:
    shape = public_config()
    for name in ("draft_vocab_size", "torch_dtype"):
        del shape[name]
    shape["architectures"] = None
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "draft_vocab_size": ROWS, "norm_before_residual": False, "transformer_layer_config": shape,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
        "speculators_config": {"algorithm": "eagle3"},
    }  # fmt: skip
    tensors = public_tensors(first="layers.0")
    draft, _ = load(write(tmp_path, tensors, config), target)
    assert draft.taps == (1, 3, 6)
    assert draft.midlayer.norm_before_residual is False
    del config["norm_before_residual"]  # its reader takes that for true
    assert load(write(tmp_path, tensors, config), target)[0].midlayer.norm_before_residual is True


@pytest.mark.parametrize("kept", ["input_layernorm", "hidden_norm"])
def test_later_layers_have_one_norm_under_either_name(
    kept: str, tmp_path: Path, target: Llama
) -> None:
    tensors = public_tensors(2)
    other = "hidden_norm" if kept == "input_layernorm" else "input_layernorm"
    norm = tensors[f"layers.1.{kept}.weight"]
    del tensors[f"layers.1.{other}.weight"]
    draft, _ = load(write(tmp_path, tensors, public_config(2)), target)
    assert torch.equal(dict(draft.named_parameters())["layers.0.input_layernorm.weight"], norm)


def test_own_embedding_is_kept_only_where_it_differs(tmp_path: Path, target: Llama) -> None:
    tokens = torch.tensor([[5, 9]])
    own = target.embed_tokens.weight.bfloat16()
    tensors = {**public_tensors(), "embed_tokens.weight": own}
    _, head = load(write(tmp_path, tensors, public_config()), target)
    assert torch.equal(head.embed(tokens), target.embed_tokens(tokens))
    tensors["embed_tokens.weight"] = own.clone()
    tensors["embed_tokens.weight"][9] *= 1.1
    draft, head = load(write(tmp_path, tensors, public_config()), target)
    assert not torch.equal(head.embed(tokens)[:, 1], target.embed_tokens(tokens)[:, 1])
    assert torch.equal(head.embed(tokens), tensors["embed_tokens.weight"][tokens].float())
    save_draft(tmp_path, draft, head, target.embed_tokens.weight, torch.float32)
    _, again = load(tmp_path, target)
    assert torch.equal(again.embed(tokens), head.embed(tokens))


def with_rope(folder: Path, wiring: str, rope: dict[str, Any]) -> Path:
    """A public folder that states ``rope`` and 8 positions."""
    if wiring == "eagle3":
        write(folder, public_tensors(), public_config())
    else:
        write_draft(folder, layers=1)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    config |= {"max_position_embeddings": 8, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("rope", [{}, {"rope_theta": None}, {"rope_scaling": None}])
@pytest.mark.parametrize("wiring", ["eagle", "eagle3"])
def test_positions_turn_as_the_targets_if_nothing_is_stated(
    wiring: str, rope: dict[str, Any], tmp_path: Path, target: Llama
) -> None:
    draft = load_draft(with_rope(tmp_path, wiring, rope), target, 64).draft
    assert torch.equal(draft.rotary.table, target.rotary.table)
    assert draft.config.max_position_embeddings == target.config.max_position_embeddings


@pytest.mark.parametrize(
    ("rope", "theta", "scaled"),
    [
        ({"rope_theta": 1e4}, 1e4, False),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, False),
        ({"rope_theta": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 3e4, True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1e4, True),  # the default theta
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, False),
    ],
)
@pytest.mark.parametrize("wiring", ["eagle", "eagle3"])
def test_positions_turn_as_stated(
    wiring: str, rope: dict[str, Any], theta: float, scaled: bool, tmp_path: Path, target: Llama
) -> None:
    """It was trained so, and other engines read it so; only its context is not believed."""
    draft = load_draft(with_rope(tmp_path, wiring, rope), target, 64).draft
    assert draft.config.rope_theta == theta
    assert (draft.config.rope_scaling is not None) == scaled
    turns = theta ** -(torch.arange(0, 8, 2) / 8) / (4.0 if scaled else 1.0)
    torch.testing.assert_close(draft.rotary.table[1, 0, 0, :4], turns.cos())
    assert draft.rotary.table.shape[0] == 64
    assert draft.config.max_position_embeddings == target.config.max_position_embeddings


@pytest.mark.parametrize("wiring", ["eagle", "eagle3"])
def test_rope_that_is_not_implemented_is_refused(
    wiring: str, tmp_path: Path, target: Llama
) -> None:
    with_rope(tmp_path, wiring, {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}: rope_type='yarn'"):
        load_draft(tmp_path, target, 64)


def test_speculators_rope_is_the_nested_one(tmp_path: Path, target: Llama) -> None:
    nested = public_config(rope_theta=2e4)
    config = {
        "architectures": ["Eagle3Speculator"], "draft_vocab_size": ROWS,
        "norm_before_residual": False, "transformer_layer_config": nested, "rope_theta": 9.0,
    }  # fmt: skip
    nested["architectures"] = ["LlamaForCausalLM"]
    draft, _ = load(write(tmp_path, public_tensors(first="layers.0"), config), target)
    assert draft.config.rope_theta == 2e4


def test_pickled_weights_of_older_public_drafts(tmp_path: Path, target: Llama) -> None:
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in
               public_tensors().items()}  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(public_config()))
    _, head = load(tmp_path, target)
    assert torch.equal(head.lm_head.weight, tensors["lm_head.weight"].float())
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a pickle"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load_draft(tmp_path, target, 64)


TAP_CASES: list[tuple[Any, Any, Any]] = [
    # top level (inputs), nested (outputs), taps or what the message says
    (None, None, TAPS),
    ([1, 3, 6], None, (1, 3, 6)),
    (None, [0, 2, 5], (1, 3, 6)),
    ([1, 3, 6], [0, 2, 5], (1, 3, 6)),
    ([2, 4, 8], None, (2, 4, 8)),  # the last layer's output
    ([1, 3, 6], [1, 3, 6], "disagree"),
    ([1, 3, 9], None, "ascending"),
    ([3, 1, 6], None, "ascending"),
    ([1, 1, 6], None, "ascending"),
    ([-1, 1, 6], None, "ascending"),
    ([1, "3", 6], None, "list of layers"),
    (5, None, "list of layers"),
    ([1, 3], None, "'fc.weight' has shape"),
]


@pytest.mark.parametrize(("inputs", "outputs", "expected"), TAP_CASES)
def test_taps(inputs: Any, outputs: Any, expected: Any, tmp_path: Path, target: Llama) -> None:
    name = "eagle_aux_hidden_state_layer_ids"
    config = public_config() | ({} if inputs is None else {name: inputs})
    if outputs is not None:
        config["eagle_config"] = {name: outputs, "use_aux_hidden_state": True}
    write(tmp_path, public_tensors(), config)
    if isinstance(expected, tuple):
        assert load(tmp_path, target)[0].taps == expected
        return
    with pytest.raises(CheckpointError, match=expected) as caught:
        load(tmp_path, target)
    if expected == "disagree":
        assert f"eagle_config.{name}=[1, 3, 6]" in str(caught.value)
        assert f": {name}=[1, 3, 6]" in str(caught.value)


def change(name: str, edit: Callable[[Tensor], Tensor] | None) -> Callable[..., None]:
    def apply(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        if edit is None:
            del tensors[name]
        else:
            tensors[name] = edit(tensors.get(name, torch.ones(D)))

    return apply


def field(**changes: Any) -> Callable[..., None]:
    def apply(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config |= changes

    return apply


def mark(tensor: Tensor) -> Tensor:
    tensor[1] = True
    return tensor


DAMAGE: dict[str, tuple[Callable[..., None], str]] = {
    **{f"no {n}": (change(n, None), f"'{n}' is missing") for n in public_shapes() if n != "t2d"},
    "unknown": (change("fc.bias", torch.clone), "'fc.bias' has no place"),
    "a layer too many": (change("layers.1.mlp.up_proj.weight", torch.clone), "has no place"),
    "both first layers": (change("layers.0.hidden_norm.weight", torch.clone), "has no place"),
    "misshapen": (change("fc.weight", lambda t: t[:, :64].contiguous()), "'fc.weight' has shape"),
    "rows": (field(draft_vocab_size=ROWS - 1), "'d2t' is torch.int64"),
    "draft vocabulary": (field(draft_vocab_size=0), "draft_vocab_size=0"),
    "draft vocabulary, large": (field(draft_vocab_size=VOCAB + 1), f"draft_vocab_size={VOCAB + 1}"),
    "absolute d2t": (change("d2t", lambda t: t + torch.arange(ROWS)), "'d2t' leads outside"),
    "d2t of floats": (change("d2t", lambda t: t.float()), "'d2t' is torch.float32"),
    "d2t twice": (change("d2t", lambda t: -torch.arange(ROWS)), "'d2t' leads to one token twice"),
    "negative d2t": (change("d2t", lambda t: t - 1), "'d2t' leads outside"),
    "another t2d": (change("t2d", mark), "'t2d' does not mark"),
    "short t2d": (change("t2d", lambda t: t[:-1].clone()), "'t2d' does not mark"),
    "embedding": (change("embed_tokens.weight", lambda t: torch.ones(VOCAB, 16)), "embed_tokens"),
    "no taps": (field(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state=False"),
    "another width": (field(hidden_size=64), "hidden_size is 64, the target's is 32"),
    "another vocabulary": (field(vocab_size=300), f"vocab_size is 300, the target's is {VOCAB}"),
    "another architecture": (field(architectures=["DeepseekEagle3"]), "architectures="),
    "norm before fc": (field(norm_before_fc=True), "norm_before_fc=True"),
    "a word": (field(norm_before_residual="no"), "norm_before_residual='no'"),
    "activation": (field(hidden_act="gelu"), "hidden_act"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused_by_name(damage: str, tmp_path: Path, target: Llama) -> None:
    apply, message = DAMAGE[damage]
    tensors, config = public_tensors(), public_config()
    apply(tensors, config)
    write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_draft(tmp_path, target, 64)
    assert "\n" not in str(caught.value)
    assert tmp_path.name in str(caught.value)


def test_two_norms_that_differ_are_refused(tmp_path: Path, target: Llama) -> None:
    tensors = public_tensors(2)
    tensors["layers.1.hidden_norm.weight"] += 1
    write(tmp_path, tensors, public_config(2))
    with pytest.raises(CheckpointError, match=r"'layers\.1\.input_layernorm.*hidden_norm.*differ"):
        load(tmp_path, target)


def test_shallow_target_has_no_default_taps(tmp_path: Path) -> None:
    shallow = Llama(tiny_config(layers=6), 64).requires_grad_(False)
    write(tmp_path, public_tensors(), public_config())
    with pytest.raises(CheckpointError, match=r"eagle_aux_hidden_state_layer_ids.*6 layers"):
        load(tmp_path, shallow)


def test_wiring_that_is_not_the_methods_is_refused(tmp_path: Path, target: Llama) -> None:
    """Loaded as the other wiring a draft is never right, and nothing would say why."""
    write(tmp_path, public_tensors(), public_config())
    with pytest.raises(CheckpointError, match=r"EAGLE-3.*give method 'eagle3'"):
        load_draft(tmp_path, target, 64, "eagle")
    save_draft(tmp_path, make_draft(), None, None)
    with pytest.raises(CheckpointError, match=r"EAGLE-1.*give method 'eagle'"):
        load_draft(tmp_path, target, 64, "eagle3")
    for method in ("eagle", None):
        loaded = load_draft(tmp_path, target, 64, method)  # type: ignore[arg-type]
        assert isinstance(loaded.draft, EagleDraft)
        assert isinstance(loaded.head, DraftHead)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_draft_of_any_target(dtype: torch.dtype, target: Llama) -> None:
    config = replace(target.config, num_layers=32, tie_word_embeddings=True)
    deep = Llama(config, 16).to(dtype).requires_grad_(False)
    draft, head = random_eagle3(deep, 100, layers=2)
    assert draft.taps == (2, 16, 29)
    assert head.lm_head.weight.shape == (100, D)
    assert head.token_ids is not None
    assert len(set(head.token_ids.tolist())) == 100
    assert int(head.token_ids.max()) < VOCAB
    for module in (draft, head):
        for name, weight in module.named_parameters():
            assert weight.dtype == dtype
            if "norm" not in name:
                assert 0.015 < float(weight.float().std()) < 0.025, name
