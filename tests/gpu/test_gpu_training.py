"""Training on the card: flash with merged sums, the fused loss, small kernels, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._composable.checkpoint_activation import checkpoint as recompute

from aquiline.attention.unrolled import chained_attention
from aquiline.kernels import ops
from aquiline.layers.mlp import MLP
from aquiline.training import vocabulary_loss as vocabulary
from aquiline.training.config import TrainConfig
from aquiline.training.packing import PackedBatch
from aquiline.training.student import Student, scored_positions
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.vocabulary_loss import Heads, vocabulary_loss
from tests.laws.tiny import CONFIG, tiny_target
from tests.training.packed import packed

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def learning(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(BF16).requires_grad_()


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def gap(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("heads", "kv", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 64)])
def test_unrolled_attention(heads: int, kv: int, size: int, steps: int) -> None:
    edges = torch.tensor([0, 300, 301, 1000, 1777], dtype=torch.int32, device="cuda")
    count = int(edges[-1])
    low = [learning(count, heads, size), *(learning(count, kv, size) for _ in range(2 + 2 * steps))]
    high = [exact(x) for x in low]
    up, found = torch.randn(count, heads, size, device="cuda"), []
    for q, k0, v0, *chain in (low, high):
        keys, values = tuple(chain[:steps]), tuple(chain[steps:])
        out = chained_attention(q, k0, v0, keys, values, edges, 776)
        out.backward(up.to(out.dtype))
        found.append(out)
    assert gap(*found) < 1e-2
    for mine, theirs in zip(low, high, strict=True):
        assert gap(mine.grad, theirs.grad) < 2e-2


@pytest.mark.parametrize("divergence", ["ce", "kl", "tv", "lk"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_vocabulary_loss(
    steps: int, reduced: bool, divergence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocab, width = 1000, 5003 if steps == 1 else 5008, 256  # rows aligned to 16 bytes or not
    monkeypatch.setitem(vocabulary.LOGITS, "cuda", 300 * vocab * steps)  # uneven chunks
    ids = torch.arange(0, vocab, 4, device="cuda") if reduced else None
    size = vocab if ids is None else len(ids)
    low = [learning(steps, rows, width), learning(size, width, scale=0.2)]
    features, target = learning(rows, width).detach(), learning(vocab, width, scale=0.2).detach()
    high, results = [exact(x) for x in low], []
    weights = torch.rand(steps, rows, device="cuda")
    host = [x.detach().cpu().requires_grad_() for x in low]  # the twin in bf16: how near it comes
    for (hidden, head), to in ((low, BF16), (high, torch.float64), (host, BF16)):
        place = hidden.device
        named = None if ids is None else ids.to(place)
        heads = Heads(head, target.to(place, to), named)
        loss, sums = vocabulary_loss(
            divergence, 3.0, hidden, features.to(place, to), heads, weights.to(place)
        )
        loss.backward()
        results.append((loss, sums))
    assert gap(results[0][0], results[1][0]) < 1e-2
    assert gap(results[0][1][:2], results[1][1][:2]) < 1e-2
    for mine, theirs, twin in zip(low, high, host, strict=True):  # tv jumps where the laws cross
        assert gap(mine.grad, theirs.grad) < max(3e-2, 1.2 * gap(twin.grad.cuda(), theirs.grad))


# -------------------------------------------------------------------------------- the small kernels


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> list[Tensor]:
    """Outputs, then the inputs' gradients for random ones of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*(1 * leaf for leaf in leaves))
    kept = [out.detach().clone() for out in outs]
    generator = torch.Generator("cuda").manual_seed(3)
    ups = [torch.randn(out.shape, device="cuda", generator=generator) for out in outs]
    torch.autograd.backward(
        outs, [up.to(BF16).to(out.dtype) for up, out in zip(ups, outs, strict=True)]
    )
    return kept + [leaf.grad for leaf in leaves if leaf.grad is not None]


def normed(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (ops.rms_norm(x, weight, 1e-5),)


def streamed(x: Tensor, down: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    stream = ops.residual_linear(x, down, residual, ops.Norm(weight, 1e-5))
    return stream.x, stream.value()


def activated(gate_up: Tensor) -> tuple[Tensor, ...]:
    return (ops.silu_mul(gate_up),)


def turned(heads: Tensor, kv: int) -> tuple[Tensor, ...]:
    angles = torch.outer(torch.arange(heads.shape[1]), 0.9 ** torch.arange(heads.shape[3] // 2))
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)
    both = torch.stack((cos, sin), dim=1)[None, :, :, None].to("cuda", BF16).to(heads.dtype)
    return ops.rotary_split(heads, *both.unbind(2), kv)


SMALL = {
    "norm 576": (normed, [(1, 4099, 576), (576,)]),
    "norm 4096": (normed, [(2, 1000, 4096), (4096,)]),
    "norm 8192": (normed, [(1, 77, 8192), (8192,)]),
    "stream 576": (streamed, [(1, 4099, 64), (576, 64), (1, 4099, 576), (576,)]),
    "stream 100": (streamed, [(3, 5, 40), (100, 40), (3, 5, 100), (100,)]),
    "stream 4096": (streamed, [(1, 1000, 64), (4096, 64), (1, 1000, 4096), (4096,)]),
    "silu 1536": (activated, [(1, 4099, 3072)]),
    "silu 100": (activated, [(3, 7, 200)]),
    "rotary 9, 3, 64": (lambda x: turned(x, 3), [(1, 4099, 15, 64)]),
    "rotary 32, 8, 128": (lambda x: turned(x, 8), [(1, 777, 48, 128)]),
    "rotary 3, 1, 20": (lambda x: turned(x, 1), [(1, 77, 5, 20)]),
    "smooth l1": (lambda x, y: (ops.regression(x, y.detach(), 1.0),), [(3, 999, 576), (999, 576)]),
    "l1": (lambda x, y: (ops.regression(x, y.detach(), 0.0),), [(1, 7, 4096), (7, 4096)]),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_small_kernels_and_their_gradients(name: str) -> None:
    function, shapes = SMALL[name]
    inputs = [torch.randn(shape, device="cuda").to(BF16) for shape in shapes]
    found = outputs_and_gradients(function, inputs)
    for other, mine in zip(outputs_and_gradients(function, inputs), found, strict=True):
        assert other.equal(mine), "runs differ"
    expected = outputs_and_gradients(function, [x.double() for x in inputs])
    for mine, truth in zip(found, expected, strict=True):
        assert gap(mine, truth) < 4e-3  # the rounding of what is stored, twice in a stream
    for mine, truth in zip(
        outputs_and_gradients(function, [x.float() for x in inputs]), expected, strict=True
    ):
        assert gap(mine, truth) < 1e-5


def test_recomputed_feed_forward_layers_learn_the_same() -> None:
    batch, found = packed([23, 9, 17, 5]), []
    for again in (False, True):
        teacher = LlamaTeacher(tiny_target(0, replace(CONFIG, num_layers=7)).to("cuda", BF16))
        config = TrainConfig("t", "d", max_length=64, tokens_per_batch=64)
        student = Student(config, teacher, None)
        for module in student.modules():
            if again and isinstance(module, MLP):
                recompute(module, preserve_rng_state=False)
        moved = on_the_card(batch)
        count = torch.tensor(len(scored_positions(moved)), device="cuda")
        student(moved, teacher(moved, ()), count).total.backward()
        found.append([p.grad for p in student.parameters()])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


# -------------------------------------------------------------------------------------- the student


def on_the_card(batch: PackedBatch) -> PackedBatch:
    names = ("tokens", "loss_mask", "positions", "cu_seqlens")
    return replace(batch, **{name: getattr(batch, name).cuda() for name in names})


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_students_loss_is_the_cpus(method: str) -> None:
    config = TrainConfig(
        "t", "d", method=method, objective="lk", unroll=3, max_length=64, tokens_per_batch=64
    )  # type: ignore[arg-type]
    batch, found = packed([23, 9, 17, 5], padding=10), []
    for device, dtype in (("cuda", BF16), ("cpu", torch.float64)):
        target = tiny_target(0, replace(CONFIG, num_layers=7)).to(device, dtype)
        teacher = LlamaTeacher(target)
        student = Student(config, teacher, None)
        with torch.no_grad():
            for index, parameter in enumerate(student.parameters()):
                generator = torch.Generator().manual_seed(index)
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * values if values.dim() == 1 else 0.2 * values)
        moved = on_the_card(batch) if device == "cuda" else batch
        count = torch.tensor(len(scored_positions(moved)), device=device)
        loss = student(moved, teacher(moved, student.draft.taps), count)
        loss.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        found.append(loss.total.cpu())
    assert gap(*found) < 3e-2
