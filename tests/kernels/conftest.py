"""Triton kernels run in its interpreter here; it is chosen when triton is first imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
