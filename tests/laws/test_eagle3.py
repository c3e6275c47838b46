"""EAGLE-3 under laws 1 and 3, and its drafts against the wiring written out again.

The second half shares only the target with the package: the draft is the equations of the public
layout, by tensor name, over whole sequences and without any cache.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aquiline.attention.packed import PackedAttention
from aquiline.core.params import SamplingParams
from aquiline.decoding import round as round_module
from aquiline.models.eagle3_checkpoint import eagle3_tensors
from aquiline.speculation.tree import TreeShape
from tests.laws.tiny import (
    CONFIG,
    VOCAB,
    agreeable_rule,
    decode,
    oracle_text,
    tiny_eagle3_models,
)

GREEDY = SamplingParams(temperature=0)
TREES = {
    "chain-1": TreeShape.chain(1),
    "chain-3": TreeShape.chain(3),
    "lopsided": TreeShape.of([[0], [1], [1, 0], [1, 1], [1, 1, 0]]),
    "eagle-25": TreeShape.named("eagle-25"),
}
COUNT = 10


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("rule", ["coupled", "multi-round"])
@pytest.mark.parametrize(("draft_vocab", "layers"), [(VOCAB, 1), (17, 2)])
@pytest.mark.parametrize("tree", TREES)
def test_text_is_the_oracles(tree, draft_vocab, layers, rule):
    models = tiny_eagle3_models(70, draft_vocab, layers)
    prompts, seeds = _prompts([4, 1, 5]), [1, 2, 3]
    params = [GREEDY, GREEDY if rule == "multi-round" else SamplingParams(), GREEDY]
    decoded = decode(models, prompts, COUNT, TREES[tree], params, seeds, rule)
    assert decoded.texts == [
        oracle_text(models.target, prompt, COUNT, one, seed)
        for prompt, one, seed in zip(prompts, params, seeds, strict=True)
    ]


@pytest.mark.parametrize("variant", ["one layer", "two layers", "residual after the norm"])
@pytest.mark.parametrize("foreseen", [0, 1, 3])
@pytest.mark.parametrize("tree", TREES)
def test_drafts_are_those_of_the_equations(tree, foreseen, variant, monkeypatch):
    """Logits of every level to 1e-10, through prefill, re-sync and the tree."""
    shape = TREES[tree]
    models = tiny_eagle3_models(80, 23, 2 if variant == "two layers" else 1)
    midlayer = models.drafter.draft.midlayer
    midlayer.norm_before_residual = variant == "residual after the norm"
    naive = Naive(models, midlayer.norm_before_residual)
    rounds = []  # per round: the tree's tokens and each pass's logits

    def recording_grow(tables, root, score, to_target, foreseen):
        seen = []
        handle = models.drafter.head.register_forward_hook(lambda m, a, out: seen.append(out))
        tokens = real_grow(tables, root, score, to_target, foreseen)
        handle.remove()
        rounds.append((tokens, seen))
        return tokens

    real_grow = round_module.grow
    monkeypatch.setattr(round_module, "grow", recording_grow)
    prompts = _prompts([4, 1, 5], seed=8)
    rule = agreeable_rule(shape, foreseen)
    decoded = decode(models, prompts, COUNT, shape, [GREEDY] * 3, range(3), rule)
    tables = shape.tables(torch.device("cpu"))
    expanded = [[()]]
    for depth in range(1, shape.depth):
        expanded.append([shape.paths[node - 1] for node in tables.expanded_nodes[depth].tolist()])
    checked = 0
    for row, prompt in enumerate(prompts):
        text, known = prompt + decoded.texts[row], len(prompt) + 1
        for (tokens, passes), accepted in zip(rounds, decoded.accepted[row], strict=False):
            nodes = dict(zip(shape.paths, tokens[row, 1:].tolist(), strict=True))
            for paths, logits in zip(expanded, passes, strict=True):
                for path, ours in zip(paths, logits[row], strict=True):
                    said = [nodes[path[: depth + 1]] for depth in range(len(path))]
                    theirs = naive.logits(text[:known], said)
                    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
                    best = naive.ids[theirs.argsort(descending=True)]
                    for child, node in nodes.items():
                        if child[:-1] == path:
                            assert node == best[child[-1]]
                    checked += 1
            known += accepted + 1
            if known > len(text):
                break
    assert checked > 10


class Naive:
    """One EAGLE-3 draft, by its public tensor names."""

    def __init__(self, models, norm_before_residual: bool) -> None:
        self.target, self.norm_before_residual = models.target, norm_before_residual
        self.w = eagle3_tensors(models.drafter.draft, models.drafter.head)
        self.layers = models.drafter.draft.config.num_layers
        self.ids = torch.arange(len(self.w["d2t"])) + self.w["d2t"]

    def logits(self, text, said):
        """[Vd] after ``text`` and the drafted tokens ``said``.

        The draft has read text[1:] beside the target's taps, then ``said`` beside its own states.
        """
        count = len(text) - 1
        attention = PackedAttention(torch.tensor([0, count], dtype=torch.int32), count)
        taps = self.target(
            torch.tensor([text[:-1]]), torch.arange(count)[None], attention, (1, 2, 4)
        ).taps
        states = torch.cat([tap[0] for tap in taps], -1) @ self.w["fc.weight"].T
        tokens = list(text[1:])
        out = self._step(tokens, states)
        for token in said:
            tokens, states = [*tokens, token], torch.cat((states, out[-1:]))
            out = self._step(tokens, states)
        return self.w["lm_head.weight"] @ self._norm(out[-1], "norm")

    def _norm(self, x, name):
        scale = (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).rsqrt()
        return x * scale * self.w[f"{name}.weight"]

    def _step(self, tokens, states):
        embedded = self.target.embed_tokens.weight[tokens]
        normed = self._norm(states, "midlayer.hidden_norm")
        both = torch.cat((self._norm(embedded, "midlayer.input_layernorm"), normed), -1)
        residual = normed if self.norm_before_residual else states
        x = self._rest("midlayer", residual, both)
        for index in range(1, self.layers):
            name = f"layers.{index}"
            x = self._rest(name, x, self._norm(x, f"{name}.hidden_norm"))
        return x

    def _rest(self, name, residual, read):
        x = residual + self._attention(f"{name}.self_attn", read)
        normed = self._norm(x, f"{name}.post_attention_layernorm")
        gate, up = (normed @ self.w[f"{name}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return x + (F.silu(gate) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T

    def _attention(self, name, x):
        count, size = len(x), CONFIG.head_dim
        q, k, v = (
            (x @ self.w[f"{name}.{n}_proj.weight"].T).view(count, -1, size).transpose(0, 1)
            for n in "qkv"
        )
        group = CONFIG.num_heads // CONFIG.num_kv_heads
        q, k = self._turn(q), self._turn(k).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / size**0.5
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = weights @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1).reshape(count, -1) @ self.w[f"{name}.o_proj.weight"].T

    def _turn(self, x):
        """Rotate-half by fp32 angles, as checkpoints are trained."""
        half = CONFIG.head_dim // 2
        speeds = 1.0 / CONFIG.rope_theta ** (torch.arange(half).float() / half)
        angles = torch.arange(x.shape[1]).float()[:, None] * speeds
        cos, sin = angles.cos().double(), angles.sin().double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
