"""Score token stores with a reference checkpoint, once, for ``--reference cached``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.fp8 import length_multiple
from megatron_groupdpo.config.rules.mixture import expert_ranks_problems
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError

EXAMPLE = """example:
  torchrun --nproc-per-node 2 tools/score_reference.py --load runs/warm --data-path data/groups.store \\
      --output data/reference --pipeline-model-parallel-size 2 --micro-batch-size 8

A run that is killed goes on where it stopped. Responses that the same weights have scored in another store under
--output (the store has grown, say) take over those numbers. The numbers do not depend on the layout. Train with
  --reference cached --reference-logprobs data/reference
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        required=True,
        metavar="FOLDER",
        help="the reference model: a checkpoint, a Hugging Face folder or hub name",
    )
    parser.add_argument("--data-path", required=True, nargs="+", metavar="STORE", help="token stores to score")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the log-probabilities are kept")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--micro-batch-size", type=int, metavar="N", help="responses per microbatch (8)")
    size.add_argument(
        "--max-tokens-per-microbatch", type=int, metavar="N", help="or: tokens, responses packed to fill it"
    )
    parser.add_argument("--groups-per-batch", type=int, default=64, metavar="N", help="groups between two writes (64)")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--context-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--expert-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="as the training run will have it; otherwise fp32")
    parser.add_argument(
        "--fp8-format", choices=("e4m3", "hybrid"), help="as the training run; with --fp8-recipe delayed, leave it out"
    )
    parser.add_argument("--fp8-recipe", choices=("tensorwise", "blockwise", "mxfp8"))
    parser.add_argument("--first-last-layers-bf16", action="store_true", help="with FP8, as the training run")
    parser.add_argument("--num-layers-at-start-in-bf16", type=int, default=1, metavar="N")
    parser.add_argument("--num-layers-at-end-in-bf16", type=int, default=1, metavar="N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def chosen_precision(args: argparse.Namespace) -> PrecisionConfig:
    """What the flags ask for, if they go together."""
    if (args.fp8_format is None) != (args.fp8_recipe is None):
        raise ConfigError("--fp8-format and --fp8-recipe go together; give both or neither")
    if args.fp8_format is not None and not args.bf16:
        raise ConfigError("--fp8-format needs --bf16: FP8 is used inside matrix products only")
    if args.first_last_layers_bf16 and args.fp8_format is None:
        raise ConfigError("--first-last-layers-bf16 acts on FP8; give --fp8-format, or leave it out")
    return PrecisionConfig(
        bf16=args.bf16,
        fp8_format=args.fp8_format,
        fp8_recipe=args.fp8_recipe,
        first_last_layers_bf16=args.first_last_layers_bf16,
        num_layers_at_start_in_bf16=args.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=args.num_layers_at_end_in_bf16,
    )


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
    args = parse()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    model_ranks = math.prod(sizes)
    if args.max_tokens_per_microbatch is None and args.micro_batch_size is None:
        args.micro_batch_size = 8
    if (
        min(
            *sizes,
            args.expert_model_parallel_size,
            args.micro_batch_size or args.max_tokens_per_microbatch,
            args.groups_per_batch,
        )
        < 1
    ):
        raise ConfigError("every size must be at least 1")
    if world % model_ranks:
        raise ConfigError(
            f"{world} ranks must be a multiple of tensor x pipeline x context = {model_ranks}; change "
            "--nproc-per-node or the parallel sizes"
        )
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        raise ConfigError("--sequence-parallel splits over the tensor-parallel ranks; set --tensor-model-parallel-size")
    stores = [TokenStore.open(path) for path in args.data_path]
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        device=args.device,
    )
    precision = chosen_precision(args)
    for problem in expert_ranks_problems(parallel, world):
        raise ConfigError(problem)
    check_token_budget(args.max_tokens_per_microbatch, stores, parallel, precision)
    # Megatron takes seconds to import: a mistyped path is answered before.
    from megatron_groupdpo.convert.start_weights import load_any_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.score import score_store

    ranks = initialize(parallel, seed=0)
    made_with = [store.meta["tokenizer"] for store in stores]
    policy = load_any_policy(args.load, parallel, precision, ranks, tokenizers_of_data=made_with)
    plan = plan_options(
        parallel,
        precision=precision,
        data_parallel_size=ranks.dp_group.size(),
        micro_batch_size=args.micro_batch_size,
        max_tokens_per_microbatch=args.max_tokens_per_microbatch,
    )
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
