"""A draft for Llama-3.1-8B-Instruct: three dense layers, sequences of 8k, regenerated answers.

    aquiline data ...        conversations whose answers the target itself has written
    torchrun --nproc-per-node 8 --no-python \\
        aquiline train --recipe recipes/llama31_8b.py --out runs/llama31-8b
    aquiline train --recipe recipes/llama31_8b.py --dry-run --gpus 8      what that takes

``target`` is the folder of the weights; a dry run does without it. The trunk keeps its rate, so
that it can be extended; cool it down from any checkpoint:

    ... --out runs/llama31-8b-cooled --from runs/llama31-8b/step-3000 --set decay_tokens=300000000
"""

from aquiline.models.config import LlamaConfig, RopeScaling
from aquiline.training.config import TrainConfig


def recipe() -> TrainConfig:
    """The whole configuration; change a field with ``--set name=value``."""
    return TrainConfig(
        target="models/Llama-3.1-8B-Instruct",
        data="runs/llama31-regenerated.jsonl",
        layers=3,
        draft_vocab_size=32000,
        max_length=8192,
        tokens_per_batch=16384,
        accumulate=2,
        shard="student",
        tokens=2_000_000_000,
        learning_rate=2e-4,
        warmup_tokens=20_000_000,
        decay_tokens=0,
        weight_decay=0.1,
        eval_every=500,
        eval_tree="tree-8",
        eval_tokens=256,
    )


def target_shape() -> LlamaConfig:
    """What Llama-3.1-8B's ``config.json`` says."""
    return LlamaConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=False,
    )
