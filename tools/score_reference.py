"""Score token stores with a reference checkpoint, once, for ``--reference cached``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_groupdpo.config import (
    CommandParser,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
    add_fields,
    given_fields,
    validate_machine,
)
from megatron_groupdpo.config.fp8 import length_multiple, reference_precision
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError

EXAMPLE = """example:
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/score_reference.py \\
      --load runs/warm --data-path data/groups.store --output data/reference \\
      --pipeline-model-parallel-size 2 --micro-batch-size 8

A run that is killed goes on where it stopped. Responses that the same weights have scored in another store under
--output (the store has grown, say) take over those numbers. The numbers do not depend on the layout. Train with
  --reference cached --reference-logprobs data/reference
"""


LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "device",
)
PRECISION = (
    "bf16",
    "fp8_format",
    "fp8_recipe",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)
MICROBATCH = 8
"""Responses of one where neither size is given."""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="score_reference.py", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--load",
        required=True,
        metavar="FOLDER",
        help="the reference model: a checkpoint, a Hugging Face folder or hub name",
    )
    parser.add_argument("--data-path", required=True, nargs="+", metavar="STORE", help="token stores to score")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the log-probabilities are kept")
    parser.add_argument("--groups-per-batch", type=int, default=64, metavar="N", help="groups between two writes (64)")
    sizes = parser.add_argument_group(f"microbatches: one of both (neither: --micro-batch-size {MICROBATCH})")
    add_fields(sizes, TrainingConfig, ("micro_batch_size", "max_tokens_per_microbatch"))
    add_fields(parser.add_argument_group("layout"), ParallelConfig, LAYOUT)
    precision = parser.add_argument_group("precision, as the training run has it (with FP8 delayed: scored in bf16)")
    add_fields(precision, PrecisionConfig, PRECISION)
    return parser


def check_token_budget(
    budget: int | None, stores: Sequence[TokenStore], parallel: ParallelConfig, precision: PrecisionConfig
) -> None:
    """Refuse a budget that the longest response does not fit in."""
    for store in stores:
        longest = int(store.meta["max_row_tokens"])
        multiple = length_multiple(parallel, precision)
        needed = -(-longest // multiple) * multiple
        if budget is not None and budget < needed:
            raise ConfigError(
                f"--max-tokens-per-microbatch {budget} cannot hold the longest prompt and response of {store.path}, "
                f"{longest} tokens; give at least {needed}"
            )


class Progress:
    """Two bars one after the other: hashing the content, which may be over at once, and scoring."""

    def __init__(self, store: TokenStore, *, quiet: bool) -> None:
        self._path, self._quiet = store.path, quiet
        self._bar = tqdm(total=len(store), unit=" groups", desc=f"hash {self._path}", delay=2.0, disable=quiet)

    def hashed(self, num_groups: int) -> None:
        """So many groups were hashed."""
        self._bar.update(num_groups)

    def start(self, done: int, total: int) -> None:
        """Scoring begins, ``done`` of ``total`` groups need no pass."""
        self.close()
        self._bar = tqdm(total=total, initial=done, unit=" groups", desc=f"score {self._path}", disable=self._quiet)

    def scored(self, num_groups: int) -> None:
        """So many groups were scored."""
        self._bar.update(num_groups)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def main() -> None:
    """Score every store on the layout of this launch."""
    args = build_parser().parse_args()
    parallel = ParallelConfig(**given_fields(args, ParallelConfig))
    precision = PrecisionConfig(**given_fields(args, PrecisionConfig))
    validate_machine(parallel, precision, int(os.environ.get("WORLD_SIZE", "1")))
    precision = reference_precision(precision)
    sizes = {name: size for name, size in given_fields(args, TrainingConfig).items() if size is not None}
    sizes = sizes or {"micro_batch_size": MICROBATCH}
    if len(sizes) > 1:
        raise ConfigError("--micro-batch-size and --max-tokens-per-microbatch exclude each other; give one of them")
    if args.groups_per_batch < 1:
        raise ConfigError(f"--groups-per-batch must be >= 1; it is {args.groups_per_batch}.")
    stores = [TokenStore.open(path) for path in args.data_path]
    check_token_budget(sizes.get("max_tokens_per_microbatch"), stores, parallel, precision)
    # Megatron takes seconds to import: a mistyped path is answered before.
    from megatron_groupdpo.convert.start_weights import load_any_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.score import score_store

    ranks = initialize(parallel, seed=0)
    made_with = [store.meta["tokenizer"] for store in stores]
    policy = load_any_policy(args.load, parallel, precision, ranks, tokenizers_of_data=made_with)
    plan = plan_options(parallel, precision=precision, data_parallel_size=ranks.dp_group.size(), **sizes)
    for store in stores:
        progress = Progress(store, quiet=not ranks.is_logger)
        done = score_store(
            policy,
            store,
            Path(args.output),
            plan=plan,
            groups_per_batch=args.groups_per_batch,
            on_hashed=progress.hashed,
            on_start=progress.start,
            on_groups=progress.scored,
        )
        progress.close()
        if ranks.is_logger:
            before = store.num_responses - done.num_scored - done.num_taken_over
            print(
                f"{store.path}: {done.num_scored} of {store.num_responses} responses scored into {args.output}, "
                f"{done.num_taken_over} taken over from other stores, {before} there before",
                flush=True,
            )
    shut_down()


if __name__ == "__main__":
    run_entry(main)
