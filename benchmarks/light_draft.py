"""Drafts trained for a minute on the very texts they will be asked for.

They are worth nothing but one thing: a wiring without a trained draft yet can be compared between
engines at an acceptance well above zero. Each learns to say the target's next feature (EAGLE-3:
after its own final norm, which is the target's) by regression, so no logits are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from aquiline.attention.packed import PackedAttention
from aquiline.models.draft import Draft, DraftHead, EagleDraft, draft_config
from aquiline.models.draft_checkpoint import LoadedDraft
from aquiline.models.eagle3 import Eagle3Head, random_eagle3
from aquiline.models.llama import Llama

RATE, SEED = 1e-3, 0


def light_draft(
    method: Literal["eagle", "eagle3"],
    layers: int,
    target: Llama,
    texts: Sequence[Sequence[int]],
    steps: int = 60,
) -> LoadedDraft:
    """A draft of ``target`` that has seen ``texts`` (token ids, prompts included) ``steps`` times.

    ``target`` in fp32, not packed.
    """
    torch.manual_seed(SEED)
    loaded = _untrained(method, layers, target)
    draft, head = loaded.draft, loaded.head
    tokens = torch.tensor([[token for text in texts for token in text]])
    lengths = torch.tensor([len(text) for text in texts])
    positions = torch.cat([torch.arange(count) for count in lengths.tolist()])[None]
    edges = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    attention = PackedAttention(edges, int(lengths.max()))
    with torch.no_grad():
        output = target(tokens, positions, attention, draft.taps)
        features = torch.cat(output.taps, dim=-1) if draft.taps else output.features
        embeddings = target.embed_tokens(tokens.roll(-1, dims=1))
        goal = output.features.roll(-1, dims=1)
    inside = torch.ones(tokens.shape[1], dtype=torch.bool)
    inside[edges[1:].long() - 1] = False  # a text's last position has no next feature
    optimizer = torch.optim.Adam(draft.requires_grad_(True).parameters(), RATE)
    for _ in range(steps):
        said = draft(embeddings, draft.fuse(features), positions, attention)
        if isinstance(head, Eagle3Head):
            said = head.norm(said)
        loss = F.smooth_l1_loss(said[0, inside], goal[0, inside])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    draft.requires_grad_(False)
    return loaded


def _untrained(method: str, layers: int, target: Llama) -> LoadedDraft:
    room = len(target.rotary.table)
    if method == "eagle":
        draft: Draft = EagleDraft(draft_config(target.config, layers, None), room)
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        return LoadedDraft(draft, DraftHead(target, None))
    draft, head = random_eagle3(target, target.config.vocab_size, layers)
    head.norm.weight.copy_(target.norm.weight)
    head.lm_head.weight.copy_(target.lm_head.weight)
    return LoadedDraft(draft, head)
