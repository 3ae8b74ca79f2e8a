"""Hugging Face folders written by a run: at intervals, and at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo.convert.exporting import ExportOptions, choose_form, export_hf
from megatron_groupdpo.convert.folders import check_target
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.folder import CONFIG
from megatron_groupdpo.convert.hf.tokenizers import ModelTokenizer
from megatron_groupdpo.data.store.reader import GroupDataset
from megatron_groupdpo.data.text.identity import options_of
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.errors import CheckpointError, DataError, UserError
from megatron_groupdpo.processes import errors_reach_all_ranks
from megatron_groupdpo.run.parts import Run

_GROUPS_LOOKED_AT = 256
"""For the tokens that end responses."""


class Exports:
    """The exports of a run. What one fails with is recorded at once and raised at the end: training goes on."""

    def __init__(self, run: Run) -> None:
        """Find what would fail, before the first step.

        Raises:
            CheckpointError: a folder is there that this run did not write; the tokenizer has gone.
            ConfigError: no family of ``transformers`` models is this model.
        """
        section = run.config.checkpoint
        self._run = run
        self._failed: list[str] = []
        self._folder = None if section.export_hf is None else Path(section.export_hf)
        if self._folder is None:
            return
        with errors_reach_all_ranks():
            choose_form(run.policy.model, ExportOptions(), run.origin)
            # Only a run that goes on may replace: then the folder is what it wrote before it stopped.
            resumes = run.progress.iteration > 0
            check_target(self._folder, overwrite=resumes, marker=CONFIG, source=run.weights_from)
            self._tokenizer = _tokenizer(run)
        if not run.tokenizer.get("response_ends", True) and run.ranks.is_logger:
            print(
                f"warning     no token ends the data's responses, and the exported model stops at "
                f"{run.tokenizer['eos_id']}, which it is not trained to write",
                flush=True,
            )

    def at(self, iteration: int) -> None:
        """Export if the interval says so; a collective call."""
        interval = self._run.config.checkpoint.export_hf_interval
        if self._folder is not None and interval is not None and iteration % interval == 0:
            self._export(self._folder.with_name(f"{self._folder.name}-iter_{iteration:07d}"))

    def at_end(self) -> None:
        """Export the final model; a collective call.

        Raises:
            CheckpointError: this or an earlier export failed.
        """
        if self._folder is not None:
            self._export(self._folder)
        if self._failed:
            raise CheckpointError(
                f"training has ended and its checkpoints are whole, but {len(self._failed)} export(s) failed: "
                f"{'; '.join(self._failed)}; export from a checkpoint with tools/convert_checkpoint.py"
            )

    def _export(self, target: Path) -> None:
        started = time.perf_counter()
        run = self._run
        try:
            report = export_hf(
                run.policy,
                target,
                ExportOptions(overwrite=True),
                tokenizer=self._tokenizer,
                kept=run.origin,
                source=run.weights_from,
                response_ends=run.tokenizer.get("response_ends", ()),
            )
        except (UserError, OSError) as error:
            self._failed.append(str(error))
            if run.ranks.is_logger:
                print(f"warning     the export to {target} failed: {error}", flush=True)
            return
        if run.ranks.is_logger:
            for note in report.notes:
                print(f"export      {note}", flush=True)
            seconds = time.perf_counter() - started
            print(f"exported {target} ({report.num_bytes:,} bytes) in {seconds:.1f} s", flush=True)


def response_ends(data: GroupDataset, tokenizer: Mapping[str, Any]) -> list[int]:
    """The control tokens that trained responses end with, found in a sample of the groups.

    Responses that were cut end anywhere, so a token counts if it is a control token, or (where the tokenizer has gone)
    if half of the responses end with it.
    """
    groups = np.unique(np.linspace(0, len(data) - 1, min(len(data), _GROUPS_LOOKED_AT)).astype(int))
    ends = Counter(int(tokens[-1]) for group in groups for tokens in data[int(group)].response_tokens)
    try:
        loaded = load_tokenizer(options_of(tokenizer))
    except UserError:
        return sorted(token for token, count in ends.items() if 2 * count >= ends.total())
    special = loaded.special_ids | {loaded.eos_id}
    return sorted(token for token, count in ends.items() if token in special and 100 * count >= ends.total())


def _tokenizer(run: Run) -> ModelTokenizer:
    """The model's own tokenizer, or the data's where it has none."""
    try:
        return tokenizers.load_checked(options_of(run.tokenizer), run.policy.model)
    except DataError as error:
        raise CheckpointError(
            f"export_hf writes the tokenizer beside the model, and it cannot be used: {error}; say where it is now "
            "with --tokenizer-model"
        ) from None
