"""Adjustments: penalties, bias, bans and the wish for log-probabilities of an engine's requests.

The table lives on the device (kernels/adjustments.py); a row is written from the host when a
request is admitted, and the device counts what is said after every round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.kernels import ops


class Adjustments(ops.AdjustmentTable):
    """One per engine; row i is the request's in row i of its DeviceRows."""

    def set(
        self,
        row: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        end_ids: Collection[int],
    ) -> None:
        """Overwrite a row, in place; nothing waits for the device.

        Args:
            prompt_ids: counted by the repetition penalty alone; ``min_tokens`` counts from its end.
            output_ids: said already, by a request that resumes.
            end_ids: tokens that end the text, ops.MAX_ENDS at most if there is ``min_tokens``. The
                parameters fit the table and leave something to say: the engine has checked.
        """
        flags = flags_of(params)
        self.flags[row].fill_(int(flags))
        if flags & ops.Flag.PENALTIES:
            self.repetition[row].fill_(params.repetition_penalty)
            self.presence[row].fill_(params.presence_penalty)
            self.frequency[row].fill_(params.frequency_penalty)
            self._send(self.prompt_seen[row], bit_words(_mask(prompt_ids, self.vocab)))
            counts = torch.zeros(self.vocab, dtype=torch.int16)
            for token, count in Counter(output_ids).items():
                counts[token] = min(count, ops.MAX_COUNT)
            self._send(self.counts[row], counts)
        if flags & ops.Flag.BIAS:
            entries = sorted((params.logit_bias or {}).items())
            self._send_ids(self.bias_ids[row], [token for token, _ in entries])
            values = torch.tensor([value for _, value in entries], dtype=torch.float32)
            self._send(self.bias_values[row, : len(values)], values)
        if flags & ops.Flag.BANS:
            self._send(self.allowed[row], bit_words(_allowed(params, self.vocab)))
        if flags & ops.Flag.MIN_TOKENS:
            self._send_ids(self.end_ids[row], sorted(end_ids))
            self.min_length[row].fill_(len(prompt_ids) + params.min_tokens)

    def _send_ids(self, target: Tensor, ids: list[int]) -> None:
        padded = ids + [ops.UNUSED] * (len(target) - len(ids))
        self._send(target, torch.tensor(padded, dtype=torch.int32))

    @staticmethod
    def _send(target: Tensor, values: Tensor) -> None:
        source = values.pin_memory() if target.is_cuda else values
        target.copy_(source, non_blocking=True)


def flags_of(params: SamplingParams) -> ops.Flag:
    """What a request asks of the table; 0 for nothing. Words have become ids before."""
    penalties = (
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )
    bans = params.allowed_token_ids is not None or params.banned_token_ids
    wanted = {
        ops.Flag.PENALTIES: penalties,
        ops.Flag.BIAS: params.logit_bias,
        ops.Flag.BANS: bans,
        ops.Flag.MIN_TOKENS: params.min_tokens,
        ops.Flag.LOGPROBS: params.logprobs is not None,
        ops.Flag.FORM: params.structured_outputs is not None,
    }
    flags = ops.Flag(0)
    for flag, on in wanted.items():
        if on:
            flags |= flag
    return flags


def _allowed(params: SamplingParams, vocab: int) -> Tensor:
    """[vocab] bool."""
    allowed = params.allowed_token_ids
    mask = torch.ones(vocab, dtype=torch.bool) if allowed is None else _mask(allowed, vocab)
    return mask & ~_mask(params.banned_token_ids, vocab)


def _mask(ids: Collection[int], vocab: int) -> Tensor:
    """[vocab] bool, true at ids."""
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[torch.tensor(list(ids), dtype=torch.int64)] = True
    return mask


def bit_words(mask: Tensor) -> Tensor:
    """[..., V] bool -> int32 words, bit t % 32 of word t // 32 for token t."""
    bits = torch.nn.functional.pad(mask.long(), (0, -mask.shape[-1] % 32))
    words = (bits.view(*mask.shape[:-1], -1, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
