"""Ranks for Transformer Engine's own Python (te_runtime.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import te_runtime
from rank_pool import RankPool


class TePool:
    """Ranks of their own, since what stands in for kernels stays in a process; others where mxfp8 is asked for."""

    def __init__(self) -> None:
        self.hopper = RankPool(4, ancestor="te_ancestor_hopper")
        self.blackwell = RankPool(2, ancestor="te_ancestor_blackwell")

    def run(self, num_ranks: int, function: str, *args: Any, **how: Any) -> list[Any]:
        """A function of ``te_case``, or of a module that is named before a point."""
        module, _, name = function.rpartition(".")
        where = (module or "te_case", name)
        if any(isinstance(arg, Mapping) and arg.get("fp8_recipe") == "mxfp8" for arg in args):
            return self.blackwell.run(num_ranks, te_runtime.call_on_blackwell, *where, *args, **how)
        return self.hopper.run(num_ranks, te_runtime.call, *where, *args, **how)

    def one(self, function: str, *args: Any) -> Any:
        """The same on one rank."""
        (result,) = self.run(1, function, *args)
        return result

    def close(self) -> None:
        """End all processes."""
        self.hopper.close()
        self.blackwell.close()
