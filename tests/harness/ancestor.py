"""What the ranks of a pool need, imported once: they are forked from a process that has imported this."""

from __future__ import annotations

import gc

import graph_case
import tiny_run
import transformers

from megatron_groupdpo.run import build

__all__ = ["build", "graph_case", "tiny_run", "transformers"]

gc.freeze()  # so that no rank's collector writes to these pages, and all ranks share them
