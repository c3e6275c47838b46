"""What every Triton kernel here shares: dependent launch, and how to run in the interpreter.

Programmatic dependent launch (Hopper and later): a kernel may start while the one before it still
runs. Each kernel first lets its own successor start, then fetches what no kernel writes (weights)
into L2, then waits until everything before it is complete and visible. So the card reads weights
while small kernels, which cannot keep it busy, are at work. A kernel that waits has waited for the
whole chain before it, so nothing else about ordering changes.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LINE = 128  # bytes of one cache line


@functools.cache
def dependent_launch() -> bool:
    """Whether this device offers programmatic dependent launch."""
    return not INTERPRET and torch.cuda.get_device_capability()[0] >= 9


def options(warps: int, stages: int = 2, early: bool = True) -> dict[str, int | bool]:
    """Launch options of a kernel whose first statement is ``begin(PDL)``.

    ``early`` lets it start beside the kernel in front. Programs are then put where there is room
    at that moment: two or three on one multiprocessor, none on the next. A kernel with one long
    program for each multiprocessor has to start on an empty card.
    """
    if INTERPRET:
        return {}
    pdl = early and dependent_launch()
    return {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl}


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(rows, ok, BYTES: tl.constexpr, LINE: tl.constexpr):
    """Ask for the first ``BYTES`` behind each address rows [N] (int64) to be brought into L2."""
    lines = rows[:, None] + tl.arange(0, BYTES // LINE)[None, :] * LINE
    lines = tl.where(ok[:, None], lines, tl.min(rows, axis=0))
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], tl.int32, False, 1
    )
