"""Baselines that follow matches as the coupled rule does, and draft without its noise.

The drawn tokens are the same, so the text for a seed is too, whatever the tree; only the children
differ. They are here to be measured against: what is the shared noise worth?
"""

from __future__ import annotations

from aquiline.kernels import ops
from aquiline.sampling.draw import position_noise
from aquiline.speculation.verification.coupled import Coupled
from aquiline.speculation.verification.noise import RoundNoise


class TargetOnly(Coupled):
    """Children are the draft's likeliest tokens, as in SGLang and TensorRT-LLM."""

    @staticmethod
    def proposal_noise(round_: RoundNoise, drawing: ops.NoiseKey | None) -> ops.NoiseKey | None:
        return None


class Independent(Coupled):
    """Children are drawn from the draft without replacement, with noise of their own."""

    @staticmethod
    def proposal_noise(round_: RoundNoise, drawing: ops.NoiseKey | None) -> ops.NoiseKey | None:
        return position_noise(round_.sampling, round_.positions, round_.vocab, ops.Stream.PROPOSE)
