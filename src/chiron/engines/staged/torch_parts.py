"""torch, imported where it is used first: a second that no other command should pay for."""

from __future__ import annotations

from typing import Any

try:
    import torch as _torch
    from safetensors import safe_open as _safe_open
except ImportError as error:
    raise ImportError(
        f"a stage needs torch and safetensors ({error}): pip install 'chiron-serving[staged]'; "
        "without a GPU: with --extra-index-url https://download.pytorch.org/whl/cpu"
    ) from None

torch: Any = _torch
safe_open: Any = _safe_open
