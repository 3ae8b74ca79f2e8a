"""``from megatron_groupdpo.lazy_torch import torch``: PyTorch, imported when something of it is first used.

For modules that a command needs before it computes anything (configuration, objectives' names, records): importing
PyTorch takes seconds, which ``--help`` and a mistyped flag must not wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            value = getattr(torch, name)
            setattr(self, name, value)  # asked for once
            return value

    torch = _Torch()

__all__ = ["torch"]
