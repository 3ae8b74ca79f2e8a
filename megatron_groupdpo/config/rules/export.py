"""What the fields of an export at the end of a run must be together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_groupdpo.config.sections.run import CheckpointConfig


def export_problems(checkpoint: CheckpointConfig) -> Iterator[str]:
    """One message for each rule that is broken."""
    if checkpoint.export_hf_interval is not None and checkpoint.export_hf is None:
        yield f"export_hf_interval ({checkpoint.export_hf_interval}) needs export_hf, the folder to write to; give it."
    if checkpoint.export_hf is not None and checkpoint.export_hf in (
        checkpoint.save,
        checkpoint.load,
        checkpoint.pretrained_checkpoint,
    ):
        yield (
            f"export_hf ({checkpoint.export_hf}) must be a folder of its own, not that of save, load or "
            "pretrained_checkpoint; choose another."
        )
