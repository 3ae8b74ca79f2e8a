"""Train with GroupDPO.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m megatron_groupdpo.train --config FILE [--any-field value]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_groupdpo.config import load_config, validate
from megatron_groupdpo.convert.hf.model_section import complete_model_section
from megatron_groupdpo.entry import run_entry


def train_from(argv: Sequence[str]) -> None:
    """Everything behind the command line, on one rank."""
    config = load_config(argv, complete=complete_model_section)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    # Megatron takes seconds to import: a mistyped flag is answered before.
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.run.loop import train

    ranks = initialize(config.parallel, seed=config.training.seed, deterministic=config.precision.deterministic_mode)
    train(build_run(config, ranks))
    shut_down()


def main() -> None:
    """Console entry."""
    run_entry(lambda: train_from(sys.argv[1:]))


if __name__ == "__main__":
    main()
