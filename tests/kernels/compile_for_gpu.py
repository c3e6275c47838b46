"""Compiles kernels for an H100, on any machine; run by test_triton_compiles.py.

A process of its own, for here triton must not interpret. Prints a line for each variant: kernel,
registers of a thread, bytes of its stack (what was spilled), constants. Pointers and vocabularies
are multiples of 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aquiline.kernels.triton import (
    adjust,
    chain,
    differentiable,
    divergence,
    multi_round,
    regression,
    retrieval,
    sampling,
)

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {  # by the names of the arguments; all others are int32
    "*bf16": ("logits", "target", "draft", "raw", "q", "prefix", "grad", "dq", "dkeys", "dvalues",
              "x", "weight", "carried", "dx", "gate_up", "k", "v", "cos", "signed_sin", "heads",
              "hidden", "features"),
    "*fp32": ("floor", "target_floor", "draft_floor", "temperature", "top_p", "min_p", "values",
              "stats", "target_stats", "draft_stats", "steps", "log_residual", "repetition",
              "presence", "frequency", "bias_values", "out", "weights", "terms", "held",
              "prefix_lse", "lse", "dweight"),
    "fp32": ("eta", "scale", "eps"),
    "*i32": ("indices", "peaks", "target_peaks", "flags", "prompt_seen", "bias_ids", "allowed",
             "end_ids", "ids", "best", "masks"),
    "*i16": ("counts",),
    "*u8": ("ancestors",),
    "*i64": ("top_k", "seeds", "choices", "positions", "levels", "token_ids", "drawn", "tokens",
             "children", "draft_rows", "columns", "leaf", "depth_of_leaf", "slots", "node_of",
             "min_length", "path", "chosen", "how_many", "page_table", "lengths"),
}  # fmt: skip
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names} | {
    "k_chain": ("*bf16",) * 3, "v_chain": ("*bf16",) * 3,
    "k_strides": ("i32",) * 3, "v_strides": ("i32",) * 3,
}  # fmt: skip
TEXT_TYPES = {"tokens": "*i32", "out": "*i64"}
OWN_TYPES = {retrieval._match_kernel: TEXT_TYPES, retrieval._follow_kernel: TEXT_TYPES}
ALIGNED = ("size", "vocab", "count", "q_stride", "k_strides", "v_strides", "cos_stride",
           "sin_stride")  # fmt: skip
FLOOR = {"BLOCK": sampling.ROW_BLOCK, "HELD": sampling.HELD}
DRAW = {"STREAM": 0, "COUNT": 4, "CHUNK": sampling.CHUNK}
WALK = {"STREAM": 2, "SIBLINGS": 4, "BLOCK": sampling.ROW_BLOCK}
WIDE = {"BLOCK": 32 * divergence.THREAD * divergence.WIDE_WARPS, "LOWEST": -1e30}
NEAR = {"BLOCK": 32 * divergence.THREAD * divergence.WARPS, "LOWEST": -1e30}
ADJUST = {"BIASED": 1024, "ENDS": 64, "CHUNK": adjust.CHUNK}
ROOT = dict.fromkeys(("tokens", "ancestors", "node_of", "token_ids", "raw", "masks"))
RANK = {"CHUNK": adjust.TOP_CHUNK}
MERGE = {"CHUNKS": 64, "CANDIDATES": 2048}
SMALL = {"G": 3, "D": 64, "R": 8, "G_PAD": 4, "D_PAD": 64}
LARGE = {"G": 4, "D": 128, "R": 4, "G_PAD": 4, "D_PAD": 128}
NORM = {"SIZE": 576, "PAD": 1024, "R": 4}
WIDE_NORM = {"SIZE": 8192, "PAD": 8192, "R": 1}
FEATURES = {"SIZE": 576, "PAD": 1024, "R": 2, "BETA": 1.0}
PAIRS = {"D": 64, "R": 32, "HALF": 32}
HALF = (chain.__name__, differentiable.__name__)  # where ``out`` is of the model's dtype
VARIANTS = [
    (differentiable._norm_backward, 8, NORM),
    (differentiable._norm_backward, 8, {**NORM, "carried": None}),
    (differentiable._norm_backward, 16, WIDE_NORM),
    (differentiable._silu_mul_backward, 4, {"SIZE": 1536, "BLOCK": differentiable.TILE}),
    (regression._regression, 4, {**FEATURES, "grad": None, "steps": 1}),
    (regression._regression, 4, FEATURES),
    (differentiable._turn, 4, {**PAIRS, "TURNED": 12, "ALL": 15}),
    (differentiable._turn_back, 4, {**PAIRS, "H": 9, "K": 3}),
    (divergence._divergence, 16, {**NEAR, "DIVERGENCE": "ce", "ids": None}),
    (divergence._divergence, 16, {**NEAR, "DIVERGENCE": "lk", "ids": None}),
    (divergence._divergence, 16, {**NEAR, "DIVERGENCE": "kl"}),
    (divergence._divergence, 32, {**WIDE, "DIVERGENCE": "tv", "ids": None}),
    (divergence._divergence, 32, {**WIDE, "DIVERGENCE": "lk"}),
    (adjust._adjust_kernel, 8, ADJUST),
    (adjust._adjust_kernel, 8, {**ADJUST, "node_of": None, "token_ids": None}),
    (adjust._adjust_kernel, 8, {**ADJUST, "node_of": None, "token_ids": None, "masks": None}),
    (adjust._adjust_kernel, 8, {**ADJUST, **ROOT, "levels": None, "rows": 1}),
    (adjust._count_kernel, 1, {"LEVELS": 4}),
    (adjust._count_kernel, 1, {"LEVELS": 1}),
    (adjust._rank_chunk_kernel, 4, RANK),
    (
        adjust._rank_chunk_kernel,
        4,
        {**RANK, "raw": None, "flags": None, "slots": None, "path": None},
    ),
    (adjust._rank_merge_kernel, 4, MERGE),
    (adjust._rank_merge_kernel, 4, {**MERGE, "raw": None, "path": None}),
    (chain._chain, chain.WARPS, SMALL),
    (chain._chain, chain.WARPS, LARGE),
    (chain._chain_backward, chain.WARPS, SMALL),
    (chain._chain_backward, chain.WARPS, LARGE),
    (sampling._score_floor_kernel, 16, FLOOR),
    (sampling._score_floor_kernel, 16, {**FLOOR, "nodes": 1}),
    (sampling._draw_chunk_kernel, 4, DRAW),
    (sampling._draw_chunk_kernel, 4, {**DRAW, "token_ids": None}),
    (sampling._draw_chunk_kernel, 4, {**DRAW, "token_ids": None, "levels": None, "floor": None}),
    (sampling._draw_chunk_kernel, 4, {**DRAW, "seeds": None, "token_ids": None, "nodes": 1}),
    (sampling._draw_merge_kernel, 4, {"COUNT": 4, "PADDED": 256}),
    (retrieval._match_kernel, 8, {"LONGEST": 3, "SHORTEST": 2, "CHUNK": retrieval.CHUNK}),
    (retrieval._follow_kernel, 1, {"CHUNKS": 2, "COUNT": 4}),
    (multi_round._statistics_kernel, 16, {"BLOCK": sampling.ROW_BLOCK}),
    (multi_round._walk_kernel, 16, WALK),
    (multi_round._walk_kernel, 16, {**WALK, "columns": None, "draft_floor": None, "nodes": 1}),
]

CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path


def usage(cubin: bytes) -> str:
    """Registers of a thread and bytes of its stack, as the assembler states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return " ".join(re.findall(r"(?:REG|STACK):\d+", done.stdout))


for kernel, warps, constants in VARIANTS:
    half = {"out": "*bf16"} if kernel.fn.__module__ in HALF else {}
    types = TYPE_OF | half | OWN_TYPES.get(kernel, {})
    if kernel is regression._regression:
        out = "*fp32" if "grad" in constants else "*bf16"
        types = types | {"grad": "*fp32", "out": out, "steps": "i32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    attrs = {
        place: [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        for place in ([(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)])
        if name in ALIGNED or kind[0][0] == "*"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps})
    print(kernel.fn.__name__, usage(compiled.asm["cubin"]), constants)
