"""Tiny random models in float64, a decoder for them, and an oracle that has no cache.

The oracle says one token at a time and runs the whole text through the target for each, with the
attention of training; it shares the layers and the noise with the package but neither cache, tree,
round nor sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aquiline.attention.packed import PackedAttention
from aquiline.core.params import SamplingParams, VerificationRule
from aquiline.decoding.models import DecoderModels, Drafter, Planes
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import Round
from aquiline.decoding.state import DecodeState
from aquiline.evaluation.oracle import adjusted_logits, target_distribution
from aquiline.kernels import ops
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import DraftHead, EagleDraft, draft_config
from aquiline.models.eagle3 import random_eagle3
from aquiline.models.llama import Llama
from aquiline.sampling.adjust import Adjustments
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES, RuleFactory
from aquiline.speculation.verification.verdict import verdict_of

CPU = torch.device("cpu")
VOCAB = 50
MAX_POSITIONS = 256
GARBAGE = 1e3  # finite: a masked slot may be read, it must not count
CONFIG = LlamaConfig(
    architecture="LlamaForCausalLM", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=None, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=False,
    attention_bias=False,
)  # fmt: skip


# ------------------------------------------------------------------------------------ the models


def tiny_target(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    return _initialised(Llama(config, MAX_POSITIONS), seed)


def tiny_models(seed: int = 0, token_ids: Tensor | None = None, draft_layers: int = 2):
    """A random target and a random draft that knows nothing of it."""
    target = tiny_target(seed)
    draft = EagleDraft(draft_config(CONFIG, draft_layers, None), MAX_POSITIONS)
    return DecoderModels(
        target, Drafter(_initialised(draft, seed + 1), DraftHead(target, token_ids))
    )


def tiny_eagle3_models(seed: int = 0, draft_vocab: int = VOCAB, draft_layers: int = 1):
    """The same in the EAGLE-3 wiring, on a target of four layers."""
    target = tiny_target(seed, replace(CONFIG, num_layers=4))
    draft, head = random_eagle3(target, draft_vocab, draft_layers, taps=(1, 2, 4))
    drafter = Drafter(_initialised(draft, seed + 1), _initialised(head, seed + 2))
    for module in (drafter.draft, drafter.head):  # norms that are not the identity
        for name, weight in module.named_parameters():
            if "norm" in name:
                nn.init.uniform_(weight, 0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return DecoderModels(target, drafter)


def _initialised(module, seed: int):
    generator = torch.Generator().manual_seed(seed)
    module = module.double().requires_grad_(False).eval()
    for name, weight in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(weight, std=0.3, generator=generator)
    return module


def memoryless_models() -> DecoderModels:
    """A target whose next token depends on the last alone, and a draft that is the same function.

    Attention and MLP add nothing, so the target's feature is its embedding, normed; rows of unit
    mean square make the norm the identity, and the draft's fc passes the embedding on.
    """
    target = tiny_target(seed=3, config=replace(CONFIG, rms_norm_eps=1e-15))
    draft = EagleDraft(draft_config(target.config, 1, None), MAX_POSITIONS)
    draft = _initialised(draft, 4)
    for layer in [*target.layers, *draft.layers]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    weight = target.embed_tokens.weight
    weight /= weight.square().mean(dim=-1, keepdim=True).sqrt()
    draft.fc.weight.copy_(torch.eye(CONFIG.hidden_size, 2 * CONFIG.hidden_size))
    return DecoderModels(target, Drafter(draft, DraftHead(target, None)))


class Prophet(nn.Module):
    """Stands in for draft and head: predicts given texts, by row and position, with certainty."""

    token_ids, taps, feature_size = None, (), CONFIG.hidden_size

    def __init__(self, models: DecoderModels, texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.plane_shape = models.target.plane_shape
        self.embed = models.target.embed_tokens.forward
        width = max(map(len, texts))
        self.texts = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])

    def forward(self, embeddings, features=None, positions=None, attention=None) -> Tensor:
        if positions is None:
            return self._logits(embeddings)
        return positions[:, :, None].expand(*positions.shape, CONFIG.hidden_size).double()

    def _logits(self, features: Tensor) -> Tensor:
        said_next = features[:, :, 0].long() + 2  # the pair at i holds token i + 1
        said_next = said_next.clamp(max=self.texts.shape[1] - 1)
        return 1e3 * nn.functional.one_hot(self.texts.gather(1, said_next), VOCAB).double()

    def to_target(self, ids: Tensor) -> Tensor:
        return ids

    def fuse(self, features: Tensor) -> Tensor:
        return features


def prophetic_models(models: DecoderModels, texts: Sequence[Sequence[int]]) -> DecoderModels:
    """``models`` with a draft that foresees ``texts`` (prompts included)."""
    prophet = Prophet(models, texts)
    return DecoderModels(models.target, Drafter(prophet, prophet))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ the oracle


def features_of(target: Llama, tokens: Sequence[int]) -> Tensor:
    """[1, N, d] from one forward over the whole text."""
    count = len(tokens)
    attention = PackedAttention(torch.tensor([0, count], dtype=torch.int32), count)
    return target(torch.tensor([tokens]), torch.arange(count)[None], attention).features


def oracle_text(
    target: Llama,
    prompt: Sequence[int],
    count: int,
    params: SamplingParams,
    seed: int,
    end_tokens: Sequence[int] = (),
) -> list[int]:
    """``count`` tokens after ``prompt``, one at a time; ``end_tokens`` end nothing, see decode."""
    tokens = list(prompt)
    for _ in range(count):
        logits = target.logits(features_of(target, tokens)[:, -1])[0]
        said = tokens[len(prompt) :]
        logits = adjusted_logits(logits, params, prompt, said, end_tokens)
        scores = target_distribution(logits, params).log()
        if params.temperature > 0:
            position = torch.tensor([[len(tokens)]])
            key = torch.tensor([seed]), torch.tensor([0])
            scores = scores + ops.gumbel_noise(*key, position, VOCAB)[0, 0]
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


def agreeable_rule(shape: TreeShape, foreseen: int) -> type:
    """A rule that accepts ``foreseen`` levels where the tree has them, drafted right or wrong."""

    class Agreeable(RULES["coupled"]):  # type: ignore[misc, name-defined]
        """Walks to a node of depth ``foreseen`` (the last listed), then draws."""

        def accept(self, tokens, logits):
            tables = self.round.tree
            depth = min(foreseen, shape.depth)
            leaf = [n for n in range(shape.size) if shape.depths[n] == depth][-1]
            drawn = logits.argmax(dim=-1)
            for node in tables.routes[leaf].unique().tolist():
                if node:
                    drawn[:, shape.parents[node]] = tokens[:, node]
            return verdict_of(tables, torch.full_like(tokens[:, 0], leaf), drawn)

    return Agreeable


# ----------------------------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class Decoded:
    """texts: one list per prompt; accepted: draft tokens accepted, round by round, per prompt."""

    texts: list[list[int]]
    accepted: list[list[int]]


def decode(
    models: DecoderModels,
    prompts: Sequence[Sequence[int]],
    count: int,
    shape: TreeShape,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    rule: VerificationRule | RuleFactory = "coupled",
    page_size: int = 4,
    page_seed: int = 0,
    watch: Callable[[Planes, Tensor, DecodeState], None] | None = None,
    end_tokens: Sequence[int] = (),
) -> Decoded:
    """``count`` tokens after each prompt through prefill and rounds, as one batch throughout.

    Pages are scattered at random over the pool, and every slot holds garbage until it is written.
    ``watch`` is called before each round. ``end_tokens`` are what ``min_tokens`` holds back.
    """
    rows, longest = len(prompts), max(map(len, prompts))
    columns = -(-(longest + count + shape.depth + shape.size) // page_size)
    pool = 1 + 2 * rows * columns
    planes = models.planes(pool, page_size, shape.retrieved > 0)
    for plane in (planes.target, planes.draft):
        if plane is not None:
            plane.data.fill_(GARBAGE)
    generator = torch.Generator().manual_seed(page_seed)
    page_table = 1 + torch.randperm(pool - 1, generator=generator)[: rows * columns]
    page_table = page_table.view(rows, columns)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    counts = torch.tensor([len(prompt) for prompt in prompts])
    adjustments = Adjustments.empty(rows, VOCAB, CPU)
    for row in range(rows):
        adjustments.set(row, params[row], prompts[row], (), end_tokens)
    every = range(rows)
    sampling = SamplingBatch.of(params, seeds, CPU, adjustments=adjustments, slots=every)
    width = models.feature_size
    state = DecodeState.empty(rows, shape.depth + 1, width, torch.float64, CPU)
    first = prefill(models, planes, page_table, tokens, counts, sampling).state
    state.store(torch.arange(rows), first)
    texts = [[token] for token in first.roots.tolist()]
    accepted: list[list[int]] = [[] for _ in prompts]
    tree = shape.tables(CPU)
    factory = RULES[rule] if isinstance(rule, str) else rule
    while min(map(len, texts)) < count:
        # A row that is far ahead would leave its pages: it stops and the rest go on.
        left = [row for row in range(rows) if len(texts[row]) < count]
        index = torch.tensor(left)
        part = SamplingBatch.of(
            [params[r] for r in left], [seeds[r] for r in left], CPU,
            adjustments=adjustments, slots=left,
        )  # fmt: skip
        if watch is not None:
            watch(planes, page_table[index], state.select(index))
        result = Round(
            models, planes, tree, factory, page_table[index], state.select(index), part
        ).run()
        state.store(index, result.state)
        verdict = zip(left, result.verdict.tokens.tolist(), result.verdict.accepted.tolist(),
                      strict=True)  # fmt: skip
        for row, emitted, depth in verdict:
            texts[row] += emitted[: depth + 1]
            accepted[row].append(depth)
    return Decoded([text[:count] for text in texts], accepted)
