"""Sample responses to prompts from a checkpoint, score them with a verifier, write them as group records."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_groupdpo.config import (
    CommandParser,
    ParallelConfig,
    PrecisionConfig,
    add_fields,
    given_fields,
    validate_machine,
)
from megatron_groupdpo.convert.hf.tokenizers import options_for, where_it_is_now
from megatron_groupdpo.data.text.identity import describe, differences, options_of
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError, DataError, UserError
from megatron_groupdpo.online.problems import read_problems
from megatron_groupdpo.online.verifiers import get_verifier, verifier_names

EXAMPLE = """example:
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/sample_groups.py \\
      --load runs/warm --prompts data/problems.jsonl --num-samples-per-prompt 8 --output data/groups.jsonl

Prompts are problems with known answers, as megatron_groupdpo.online.problems writes them, or GSM8K's. Ranks share
them; what is drawn does not depend on how many ranks there are, nor on the batch size.
"""


LAYOUT, PRECISION = ("tensor_model_parallel_size", "device"), ("bf16",)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="sample_groups.py", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--load", required=True, metavar="FOLDER", help="checkpoint to sample from")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON Lines of problems with known answers")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON Lines of group records to write")
    parser.add_argument("--num-samples-per-prompt", type=int, default=8, metavar="N", help="group size (8)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest response (128)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token (1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1: off)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="sequences decoded together (256)")
    parser.add_argument(
        "--verifier", choices=verifier_names(), default="exact_answer", help="how an answer is judged (exact_answer)"
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the checkpoint's tokenizer is now, if moved")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    add_fields(parser.add_argument_group("layout"), ParallelConfig, LAYOUT)
    add_fields(parser.add_argument_group("precision"), PrecisionConfig, PRECISION)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, and an output that is there already.

    Raises:
        UserError: the rule, the value and the way out.
    """
    sizes = (args.num_samples_per_prompt, args.max_new_tokens, args.batch_size)
    if min(sizes) < 1:
        raise ConfigError(
            "--num-samples-per-prompt, --max-new-tokens and --batch-size must be >= 1; they are "
            f"{', '.join(map(str, sizes))}."
        )
    if not (0 <= args.temperature < float("inf") and 0 < args.top_p <= 1):
        raise ConfigError(f"temperature must be >= 0 and top_p in (0, 1]; got {args.temperature} and {args.top_p}")
    if Path(args.output).is_dir():
        raise UserError(f"{args.output} is a folder; give a file to --output")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if Path(args.output).exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another --output or add --overwrite")


def main() -> None:
    """Sample on this launch's ranks, write on one."""
    args = build_parser().parse_args()
    parallel = ParallelConfig(**given_fields(args, ParallelConfig))
    precision = PrecisionConfig(**given_fields(args, PrecisionConfig))
    validate_machine(parallel, precision, int(os.environ.get("WORLD_SIZE", "1")))
    check(args)
    problems = read_problems(Path(args.prompts))
    # PyTorch and Megatron take seconds to import: what is mistyped is answered before.
    import torch.distributed as dist

    from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common
    from megatron_groupdpo.mcore.generate import SamplingOptions
    from megatron_groupdpo.mcore.policy import load_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.online.rollouts import rollout_groups

    ranks = initialize(parallel, seed=args.seed)
    folder = find_checkpoint(Path(args.load))
    tokenizer = find_tokenizer(args, read_common(folder)["config"].get("tokenizer"), folder)
    policy = load_policy(folder, parallel, precision, ranks)
    mine = problems[ranks.dp_group.rank() :: ranks.dp_group.size()]
    bar = tqdm(
        total=len(mine) * args.num_samples_per_prompt,
        desc="sample",
        unit=" responses",
        disable=not ranks.is_logger,
        mininterval=1.0,
    )
    groups = rollout_groups(
        policy,
        tokenizer,
        mine,
        num_samples_per_prompt=args.num_samples_per_prompt,
        options=SamplingOptions(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            batch_size=args.batch_size,
        ),
        verifier=get_verifier(args.verifier),
        on_done=bar.update,
    )
    bar.close()
    shards: list[Any] = [None] * ranks.dp_group.size()
    dist.all_gather_object(shards, groups, group=ranks.dp_group)
    if ranks.is_logger:
        everything = [shards[index % len(shards)][index // len(shards)] for index in range(len(problems))]
        write(Path(args.output), everything)
    dist.barrier()
    shut_down()


def find_tokenizer(args: argparse.Namespace, made_with: dict[str, Any] | None, folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer, from where it was or is now.

    Raises:
        DataError: it is not there, or the given one is another.
    """
    if made_with is None and args.tokenizer_model is None:
        raise DataError(f"{args.load} names no tokenizer; give the model's own with --tokenizer-model")
    if args.tokenizer_model is None:
        assert made_with is not None
        options = options_of(where_it_is_now(made_with, folder))
    else:
        template = None if made_with is None else made_with["chat_template"]
        options = replace(options_for(args.tokenizer_model), chat_template=template)
    tokenizer = load_tokenizer(options)
    differ = [] if made_with is None else differences(describe(tokenizer, options), made_with)
    if differ:
        raise DataError(f"{args.load} was trained with another tokenizer than {options.model} ({'; '.join(differ)})")
    return tokenizer


def write(path: Path, groups: list[dict[str, Any]]) -> None:
    """The file, whole or not at all, and a summary."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(group, ensure_ascii=False) + "\n" for group in groups)
    os.replace(temporary, path)
    scores = [[response["score"] for response in group["responses"]] for group in groups]
    mixed = sum(0 < sum(score > 0 for score in group) < len(group) for group in scores)
    flat = [score for group in scores for score in group]
    print(
        f"{path}: {len(groups)} groups of {len(flat) // max(1, len(groups))}; {sum(flat) / max(1, len(flat)):.1%} of "
        f"the responses verified, {mixed} groups hold both right and wrong ones",
        flush=True,
    )


if __name__ == "__main__":
    run_entry(main)
