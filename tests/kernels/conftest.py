"""Triton kernels run in the interpreter here; on a GPU they are tested in tests/gpu."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
