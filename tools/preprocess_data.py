"""Group records (JSON Lines, JSON, Parquet, Arrow) to a token store for training."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from megatron_groupdpo.config import CommandParser
from megatron_groupdpo.data.counts import summary_table
from megatron_groupdpo.data.files.reader import count_records, expand_inputs
from megatron_groupdpo.data.preprocess import partition
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.schemas import SCHEMAS, SchemaOptions
from megatron_groupdpo.data.schemas.fields import weights_from
from megatron_groupdpo.data.text import tokenize
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import UserError

EXAMPLE = """\
example:
  python tools/preprocess_data.py --input data/groups.jsonl --output data/groups.store \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/hf_folder \\
      --seq-length 2048 --partition topk --positives 8 --negatives 8

The summary at the end says what was kept, dropped and truncated, and why. After a kill or a full disk the same
command goes on where it was.
"""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="preprocess_data.py", description=__doc__, epilog=EXAMPLE)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files, folders, globs, or hf:OWNER/NAME[:SPLIT]; .gz and .zst are read too",
    )
    files.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the token store to make")
    files.add_argument("--overwrite", action="store_true", help="replace an existing token store")
    files.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="tokenizing processes; the result does not depend on it (default 1)",
    )

    records = parser.add_argument_group("records")
    names = ", ".join(schema.name for schema in SCHEMAS)
    records.add_argument(
        "--schema",
        default="auto",
        metavar="NAME",
        help=f"auto (default), or one of: {names}. sft is for single answers, never detected",
    )
    records.add_argument(
        "--score-weights",
        nargs="+",
        metavar="NAME=WEIGHT",
        help="which of several scores make a response's value, and how much each counts",
    )
    records.add_argument(
        "--on-bad-record",
        default="error",
        metavar="{error,drop}",
        help="a record that breaks its schema's rules: stop (default), or drop and count it",
    )

    sides = parser.add_argument_group("positives and negatives")
    sides.add_argument(
        "--partition",
        default="label",
        metavar=_choices(partition.PartitionRule),
        help="label (default): as the data say; topk: the best values against the worst, in the "
        "ratio of --positives to --negatives where a group is smaller than both together; threshold; "
        "mean: above against below the group's mean; rank: the best value against the rest; "
        "best-worst: one of the best against one of the worst; random-pair: two of different values",
    )
    sides.add_argument("--positives", type=int, metavar="K", help="best responses to take (topk)")
    sides.add_argument("--negatives", type=int, metavar="K", help="worst responses to take (topk)")
    sides.add_argument("--threshold", type=float, metavar="X", help="a value >= X is positive (threshold)")
    sides.add_argument(
        "--seed", type=int, metavar="N", help="of what is drawn (random-pair, --tie-break random; default 0)"
    )
    sides.add_argument(
        "--tie-break",
        default="drop",
        metavar=_choices(partition.TieBreak),
        help="responses that tie at a boundary of topk: none is taken (default), random ones, the shortest, or the "
        "first of the file",
    )
    sides.add_argument(
        "--duplicates",
        default="drop",
        metavar=_choices(partition.Duplicates),
        help="equal responses of a group: the first stays, with the mean of their values, and where labels decide "
        "and differ, none does (drop, default); or all stay (keep)",
    )
    for side, order in (
        ("positives", "the best"),
        ("negatives", "the worst"),
        ("responses", "of the larger side fewer"),
    ):
        sides.add_argument(
            f"--max-{side}",
            type=int,
            metavar="N",
            help=f"most {side} of a group: {order} stay, without values the first",
        )
    sides.add_argument(
        "--one-sided",
        default="drop",
        metavar=_choices(partition.OneSided),
        help="groups without a positive or a negative: drop (default), keep the ones with "
        "positives for the NLL term, or stop",
    )

    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--tokenizer-type",
        required=True,
        metavar="TYPE",
        help="SentencePieceTokenizer (or GPTSentencePieceTokenizer) or HuggingFaceTokenizer",
    )
    tokens.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="a SentencePiece .model file; a Hugging Face folder or hub name",
    )
    tokens.add_argument("--chat-template", metavar="FILE", help="a Jinja file in place of the tokenizer's own")
    tokens.add_argument(
        "--apply-chat-template", action="store_true", help="wrap plain-text prompts and responses as chat turns"
    )
    tokens.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}'; a record's own win",
    )
    tokens.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="the date that a chat template is told (default: the day the store was begun)",
    )
    tokens.add_argument(
        "--train-on-turn-tail",
        action="store_true",
        help="train on what the template writes after an answer's end token too (a line break), as TRL does",
    )
    tokens.add_argument(
        "--response-text",
        default="template",
        metavar=_choices(tokenize.ResponseText),
        help="train on what the chat template makes of a response (default), or on all of its text as it is, where "
        "the template would cut it",
    )
    tokens.add_argument(
        "--add-bos",
        default="auto",
        metavar=_choices(tokenize.AddBos),
        help="beginning token before plain text (default auto: as the tokenizer does)",
    )
    tokens.add_argument(
        "--seq-length", type=int, required=True, metavar="N", help="most tokens of prompt and response together"
    )
    tokens.add_argument(
        "--length-policy",
        default="drop",
        metavar=_choices(tokenize.LengthPolicy),
        help="a response that does not fit: drop it (default), cut the prompt from the left, "
        "cut the response's end, or stop",
    )
    tokens.add_argument(
        "--prefix-mismatch",
        default="drop",
        metavar=_choices(tokenize.PrefixMismatch),
        help="a chat template under which the prompt is no prefix: drop the response (default) or stop",
    )
    return parser  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that clean-up runs
    try:
        return _run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    # Here, because worker processes import this file and need nothing of what this brings in.
    from megatron_groupdpo.data.preprocess.pipeline import Listeners, preprocess

    options = PreprocessOptions(
        tokenizer=TokenizerOptions(
            kind=args.tokenizer_type, model=args.tokenizer_model, chat_template=args.chat_template
        ),
        tokenize=tokenize.TokenizeOptions(
            seq_length=args.seq_length,
            length_policy=args.length_policy,
            add_bos=args.add_bos,
            apply_chat_template=args.apply_chat_template,
            prefix_mismatch=args.prefix_mismatch,
            train_on_turn_tail=args.train_on_turn_tail,
            response_text=args.response_text,
            template_date=args.template_date,
            template_arguments=tokenize.arguments_from(args.chat_template_kwargs),
        ),
        partition=partition.Partition(
            rule=args.partition,
            positives=args.positives,
            negatives=args.negatives,
            threshold=args.threshold,
            seed=args.seed,
            tie_break=args.tie_break,
            duplicates=args.duplicates,
            max_positives=args.max_positives,
            max_negatives=args.max_negatives,
            max_responses=args.max_responses,
            one_sided=args.one_sided,
        ),
        schema=args.schema,
        schema_options=SchemaOptions(
            score_weights=weights_from(args.score_weights), apply_chat_template=args.apply_chat_template
        ),
        on_bad_record=args.on_bad_record,
    )
    sizes = [count_records(source) for source in expand_inputs(args.input)]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with tqdm(total=total, unit=" groups", desc="preprocess", mininterval=0.5) as bar:
        report = preprocess(
            args.input,
            args.output,
            options,
            overwrite=args.overwrite,
            workers=args.workers,
            listeners=Listeners(
                on_schema=lambda source, schema: bar.write(f"{source}: schema {schema.name}", file=sys.stderr),
                on_progress=bar.update,
                on_note=lambda note: bar.write(note, file=sys.stderr),
            ),
        )
    print(summary_table(report.counts))
    print(f"token store: {args.output} (digest {report.digest[:16]})")
    return 0


def _choices(literal: object) -> str:
    return "{" + ",".join(get_args(literal)) + "}"


if __name__ == "__main__":
    sys.exit(main())
