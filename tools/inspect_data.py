"""Look into a token store or record files: statistics, histograms, warnings; single groups; digests."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_groupdpo.config import CommandParser
from megatron_groupdpo.data.inspect import show
from megatron_groupdpo.data.inspect.inspection import Records, inspect_records, inspect_store, num_looked_at
from megatron_groupdpo.data.inspect.report import report
from megatron_groupdpo.data.inspect.verify import store_bytes, verify_store
from megatron_groupdpo.data.schemas import SCHEMAS, SchemaOptions
from megatron_groupdpo.data.schemas.fields import weights_from
from megatron_groupdpo.data.store.format import META, read_meta
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_groupdpo.data.store.reader import TokenStore

EXAMPLE = """\
examples:
  python tools/inspect_data.py data/groups.store --plot groups.png     statistics, warnings, histograms
  python tools/inspect_data.py data/groups.jsonl                       the same of records, before preprocessing
  python tools/inspect_data.py show data/groups.store --random 1       one group, drawn by seed 1
  python tools/inspect_data.py show data/groups.store --only one-sided --count 3
  python tools/inspect_data.py --verify data/groups.store              read every byte; exit 1 on a mismatch
"""
COMMANDS = ("stats", "show")


def build_parser() -> CommandParser:
    """The command line; ``stats`` is meant where no command is given."""
    parser = CommandParser(prog="inspect_data.py", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{stats,show}")
    common = CommandParser(add_help=False)
    common.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="one token store; or records as preprocess_data.py takes them: files, folders, globs, hf:OWNER/NAME",
    )
    names = ", ".join(schema.name for schema in SCHEMAS)
    common.add_argument("--schema", metavar="NAME", help=f"of records: auto (default), or one of {names}")
    common.add_argument("--score-weights", nargs="+", metavar="NAME=WEIGHT", help="as for preprocess_data.py")
    common.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="where a store's tokenizer is now; its digest must match. For records: whose control tokens to look for",
    )
    common.add_argument("--tokenizer-type", metavar="TYPE", help="of --tokenizer-model, for records")
    stats = commands.add_parser("stats", parents=[common], help="statistics and warnings (default)")
    stats.add_argument("--plot", type=Path, metavar="FILE", help="histograms, as .png or .html")
    stats.add_argument("--json", action="store_true", help="print JSON instead of text")
    stats.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="look at the texts of at most N groups; 0: all. Default: all below 100,000 groups, else 100,000",
    )
    stats.add_argument("--seed", type=int, metavar="N", help="of the sample of a store (default 0)")
    stats.add_argument("--verify", action="store_true", help="only compare every file of the store with its digest")
    one = commands.add_parser("show", parents=[common], help="print groups")
    which = one.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, nargs="+", metavar="I", help="by number, from 0")
    which.add_argument("--where", metavar="FILE:LINE", help="by the record it came from")
    which.add_argument("--random", type=int, metavar="SEED", help="drawn by a seed")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in show.FILTERS.items())
    one.add_argument("--only", choices=tuple(show.FILTERS), metavar="KIND", help=f"only groups of a kind. {kinds}")
    one.add_argument("--count", type=int, metavar="N", help="how many groups (default 1)")
    one.add_argument("--tokens", action="store_true", help="each token with its id (a store)")
    one.add_argument("--width", type=int, metavar="N", help="columns (default: the terminal's)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, look, print."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] not in (*COMMANDS, "-h", "--help"):
        given.insert(0, "stats")
    args = build_parser().parse_args(given)
    folder = _store_folder(args)
    try:
        if args.command == "show":
            _show_store(args, folder) if folder else _show_records(args)
        elif args.verify:
            _verify(args, folder)
        else:
            _stats(args, folder)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _store_folder(args: argparse.Namespace) -> Path | None:
    """The token store to look into, None for records. Refuses options that would not act."""
    folders = [Path(source) for source in args.source if (Path(source) / META).is_file()]
    if folders and len(args.source) > 1:
        raise ConfigError(f"inspect one token store at a time, got {' '.join(args.source)}")
    idle = ("schema", "score_weights", "tokenizer_type") if folders else ("tokens", "seed", "verify")
    for name in idle:
        if getattr(args, name, None) not in (None, False):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {'records' if folders else 'a token store'}; leave it out"
            )
    for name, least in (("count", 1), ("width", 20), ("limit", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    if args.command == "show" and (args.index or args.where):
        for name in ("count", "only"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} goes with --random or none; --index and --where name the groups already")
    return folders[0] if folders else None


def _stats(args: argparse.Namespace, folder: Path | None) -> None:
    from megatron_groupdpo.data.inspect.plot import check_plot_name, plot_inspection

    if args.plot is not None:
        check_plot_name(args.plot)
    if folder is None:
        records = _records(args)
        total = records.count()
        with _bar(total and num_looked_at(total, args.limit), " groups") as bar:
            inspection = inspect_records(records, _named_tokenizer(args), limit=args.limit, on_progress=bar.update)
    else:
        store, tokenizer, missing = _open(args, folder, must_decode=False)
        with _bar(num_looked_at(len(store), args.limit), " groups") as bar:
            inspection = inspect_store(store, tokenizer, limit=args.limit, seed=args.seed or 0, on_progress=bar.update)
        if missing:
            inspection.notes.append(f"texts were not looked at: {missing}")
    if args.plot is not None:
        plot_inspection(inspection, args.plot)
        print(f"histograms: {args.plot}", file=sys.stderr)
    if args.json:
        print(json.dumps(inspection.as_json(), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        print(report(inspection, width=shutil.get_terminal_size((100, 24)).columns))


def _show_store(args: argparse.Namespace, folder: Path) -> None:
    store, tokenizer, _ = _open(args, folder, must_decode=True)
    assert tokenizer is not None
    ends = tokenizer.special_ids | ({tokenizer.eos_id} - {None})
    rows = show.choose_rows(
        store, indices=args.index, where=args.where, seed=args.random, only=args.only, ends=frozenset(ends)
    )
    count = len(args.index) if args.index else args.count or 1
    chosen = list(itertools.islice(rows, count))
    shown = [show.show_sample(store[row], store.where(row), tokenizer, _screen(args)) for row in chosen]
    _print_groups(args, shown)


def _show_records(args: argparse.Namespace) -> None:
    if args.only in ("masked", "no-end"):
        raise ConfigError(f"--only {args.only} asks about tokens, which records have not; give a token store")
    records = _records(args)
    chosen = show.choose_records(
        records.read(), indices=args.index, where=args.where, seed=args.random, only=args.only, count=args.count or 1
    )
    if records.num_bad:
        print(f"{records.num_bad:,} bad records were passed over, the first: {records.bad[0]}", file=sys.stderr)
    _print_groups(args, [show.show_record(record, _screen(args)) for record in chosen])


def _print_groups(args: argparse.Namespace, shown: list[str]) -> None:
    if not shown:
        raise DataError(f"{' '.join(args.source)}: no group is {args.only or 'there'}")
    print("\n\n".join(shown))


def _verify(args: argparse.Namespace, folder: Path | None) -> None:
    assert folder is not None
    for name in ("plot", "json", "limit", "seed"):
        if getattr(args, name) not in (None, False):
            raise ConfigError(f"--verify reads digests only; leave --{name} out")
    with _bar(store_bytes(folder), "B") as bar:
        num_files, num_bytes = verify_store(folder, on_bytes=bar.update)
    digest = read_meta(folder)["digest"]
    print(f"{folder}: {num_files} files, {num_bytes:,} bytes: every SHA-256 is as written (store digest {digest})")


def _open(args: argparse.Namespace, folder: Path, *, must_decode: bool) -> tuple[TokenStore, Tokenizer | None, str]:
    """The store, its tokenizer, and why there is none."""
    from megatron_groupdpo.data.store.reader import TokenStore  # imports Megatron, which takes seconds

    store = TokenStore.open(folder)
    options = None
    if args.tokenizer_model is not None:
        made_with = store.meta["tokenizer"]
        options = TokenizerOptions(
            kind=made_with["kind"], model=args.tokenizer_model, chat_template=made_with["chat_template"]
        )
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = store.load_tokenizer(options)
    except DataError as error:
        if must_decode or options is not None:
            raise
        return store, None, str(error)
    return store, tokenizer, ""


def _named_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that the command line names for records."""
    if (args.tokenizer_model is None) != (args.tokenizer_type is None):
        raise ConfigError("--tokenizer-model and --tokenizer-type go together for records; give both or neither")
    if args.tokenizer_model is None:
        return None
    return load_tokenizer(TokenizerOptions(kind=args.tokenizer_type, model=args.tokenizer_model))


def _records(args: argparse.Namespace) -> Records:
    return Records(
        inputs=args.source,
        schema=args.schema or "auto",
        options=SchemaOptions(score_weights=weights_from(args.score_weights)),
    )


def _screen(args: argparse.Namespace) -> show.Screen:
    width = args.width or shutil.get_terminal_size((100, 24)).columns
    return show.Screen(width=width, colour=sys.stdout.isatty(), tokens=args.tokens)


@contextlib.contextmanager
def _bar(total: int | None, unit: str) -> Iterator[tqdm]:
    """Progress with an ETA, where it takes more than a moment."""
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc="inspect", mininterval=0.5, delay=2) as bar:
        yield bar


if __name__ == "__main__":
    run_entry(main)
