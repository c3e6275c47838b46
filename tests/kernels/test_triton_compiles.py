"""The interpreter forgives what the compiler does not: each variant has to compile, GPU or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IN_TRAINING = ("_chain", "_divergence", "_norm_backward", "_regression", "_silu_mul_backward",
               "_turn")  # fmt: skip
SCRIPT = Path(__file__).with_name("compile_for_gpu.py")


def test_the_kernels_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[2])}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    training = [line for line in done.stdout.splitlines() if line.startswith(IN_TRAINING)]
    assert training
    assert all("STACK:0" in line for line in training), "\n".join(training)  # nothing is spilled
