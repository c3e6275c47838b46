"""Triton kernels run in its interpreter here, which is chosen when triton is first imported.

With TRITON_INTERPRET=0 (to run tests/gpu in the same session) these tests are skipped.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
