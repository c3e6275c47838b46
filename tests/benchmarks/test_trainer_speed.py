"""The arithmetic limit of a training step, its synthetic batch, and the kinds of its kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks import trainer_speed
from benchmarks.shapes import LLAMA_31_8B, TINY, random_llama
from benchmarks.trainer_speed import (
    SMOLLM2,
    forward_pass,
    forward_work,
    kind_of,
    synthetic_batch,
    time_shares,
    training_step,
    training_work,
)


@pytest.mark.parametrize(("config", "limit"), [(SMOLLM2, 0.60), (LLAMA_31_8B, 0.71)])
def test_the_limit_of_a_single_step_objective(config, limit):
    """Without attention, three layers, every position scored."""
    found = forward_work(config, 0) / training_work(config, 0, 3)
    assert found == pytest.approx(limit, abs=0.005)
    assert training_work(config, 1024, 3, unroll=3) > training_work(config, 1024, 3)


def test_the_target_counts_its_matrices():
    sizes = {"embed_tokens.weight": 0}
    target = random_llama(TINY, 64, "cpu")
    matrices = sum(
        sizes.get(name, p.numel()) for name, p in target.named_parameters() if p.dim() == 2
    )
    assert forward_work(TINY, 0) == matrices


def test_documents_of_one_length_partly_scored():
    batch = synthetic_batch(50, 20, 8, 0.25)
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 20]
    assert batch.positions.tolist() == [*range(8), *range(8), *range(4)]
    assert batch.loss_mask.nonzero().flatten().tolist() == [6, 7, 14, 15]
    assert int(batch.tokens.max()) < 50


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimiser"),
        ("_divergence", "laws"),
        ("_chain_backward", "attention"),
        ("_rms_norm", "elementwise"),
        ("aten::mm", "matmul"),
    ],
)
def test_kernels_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_step_trains_and_is_profiled(monkeypatch):
    monkeypatch.setattr(trainer_speed, "PROFILED", 1)
    torch.set_num_threads(1)
    target = random_llama(TINY, 128, "cpu").float()
    batch = synthetic_batch(TINY.vocab_size, 64, 32, 1.0)
    forward_pass(target, batch)()
    step = training_step(target, batch, {"layers": 1, "unroll": 2})
    shares = time_shares(step, TINY.vocab_size)
    assert {"matmul", "vocabulary", "elementwise", "busy"} <= set(shares)
    assert sum(share for kind, share in shares.items() if kind != "busy") == pytest.approx(
        1, abs=0.01
    )
