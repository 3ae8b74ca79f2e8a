"""Hugging Face models in and out: import to a distributed checkpoint, export it back, verify by log-probabilities."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_groupdpo.config import (
    CommandParser,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    add_fields,
    given_fields,
)
from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import CheckpointError, ConfigError

EXAMPLE = """\
examples:
  python tools/convert_checkpoint.py import --hf models/llama --save checkpoints/llama
  python tools/convert_checkpoint.py export --load checkpoints/run1 --hf models/run1
  python tools/convert_checkpoint.py verify --load checkpoints/run1 --hf models/run1 --report verify.json

COMMAND --help lists the options of each. On the CPU unless --device says otherwise; import and verify also under
torchrun, each rank then holds its part of the model. The checkpoint loads on any layout.
"""


type Commands = argparse._SubParsersAction[CommandParser]
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_CPU = {"device": "cpu"}
"""Conversion is in no hurry, and a model may be larger than a GPU."""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="convert_checkpoint.py", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export,verify}")
    _add_import(commands)
    _add_export(commands)
    _add_verify(commands)
    return parser


def _add_import(commands: Commands) -> None:
    parser = commands.add_parser(
        "import",
        help="Hugging Face model to distributed checkpoint",
        description="Hugging Face model (safetensors) to distributed checkpoint. Writes SAVE/iter_0000000, "
        "the\ntokenizer, and model.yaml: the model section to put into a run's configuration.",
        epilog="example:\n  python tools/convert_checkpoint.py import --hf models/llama --save checkpoints/llama\n"
        "  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/convert_checkpoint.py import \\\n"
        "      --hf org/model --save checkpoints/model --tensor-model-parallel-size 2",
    )
    parser.add_argument("--hf", required=True, metavar="FOLDER", help="the Hugging Face model, or its name on the hub")
    parser.add_argument("--save", required=True, type=Path, metavar="FOLDER", help="the checkpoint folder to make")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=("keep", "fp32", "bf16"),
        help="of the weights; keep (default): as in the files, fp16 as fp32",
    )
    _add_common(parser, "in place of the one in the --hf folder")
    add_fields(parser, ModelConfig, ("make_vocab_size_divisible_by",))
    add_fields(parser.add_argument_group("layout"), ParallelConfig, (*_SIZES, "device"), defaults=_CPU)


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="distributed checkpoint to Hugging Face folder",
        description="Distributed checkpoint to a Hugging Face folder: config.json, generation_config.json, tokenizer, "
        "safetensors.",
        epilog="example:\n"
        "  python tools/convert_checkpoint.py export --load checkpoints/run1 --hf models/run1 --dtype bf16",
    )
    parser.add_argument(
        "--load", required=True, type=Path, metavar="FOLDER", help="a run's --save folder, or one iter_ folder in it"
    )
    parser.add_argument("--hf", required=True, type=Path, metavar="FOLDER", help="the Hugging Face folder to make")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=("keep", "fp32", "bf16", "fp16"),
        help="of the weights; keep (default): as imported, else as in the checkpoint",
    )
    parser.add_argument("--family", metavar="NAME", help="such as llama or gpt2 (default: found from the model)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, such as 500MB (default 5GB)"
    )
    _add_common(parser, "in place of the one that the checkpoint names")


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare per-token log-probabilities of both",
        description="Per-token log-probabilities of the same tokens under transformers (the --hf folder, in fp32) "
        "and Megatron (the\n--load checkpoint, or the --hf folder imported on the fly). Exits with 1 above the "
        "tolerance.",
        epilog="example:\n"
        "  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/convert_checkpoint.py verify \\\n"
        "      --hf models/llama --text sample.txt --pipeline-model-parallel-size 2 --report verify.json",
    )
    parser.add_argument("--hf", required=True, metavar="FOLDER", help="the Hugging Face model, or its name on the hub")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="the checkpoint (default: import --hf in memory)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="lines of text to compare on (default: random tokens)"
    )
    parser.add_argument("--num-sequences", type=int, default=8, metavar="N", help="lines or draws (default 8)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of each at most (default 64, or all)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of random tokens (default 1234)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference (default 1e-4; with --bf16, 4 times that of transformers in bf16 to fp32, and the "
        "mean 1.5 times)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--tokenizer", metavar="PATH", help="to read --text with, in place of the one in --hf")
    add_fields(parser.add_argument_group("layout"), ParallelConfig, (*_SIZES, "device"), defaults=_CPU)
    add_fields(parser.add_argument_group("precision of Megatron's side"), PrecisionConfig, ("bf16",))


def _add_common(parser: argparse.ArgumentParser, instead: str) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=f"{instead}: a SentencePiece .model file, a Hugging Face folder or a hub name",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of the same kind")


def _layout(args: argparse.Namespace) -> ParallelConfig:
    """The layout of this launch: one replica of the model.

    Raises:
        ConfigError: the ranks are not as many as it has.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Rank 0 may read a model or score under transformers for long while the others wait.
    parallel = ParallelConfig(**given_fields(args, ParallelConfig), distributed_timeout_minutes=24 * 60)
    sizes = {name: getattr(parallel, name) for name in _SIZES}
    if math.prod(sizes.values()) != world:
        listed = " x ".join(f"{name.split('_')[0]} {size}" for name, size in sizes.items())
        raise ConfigError(f"{world} ranks must be {listed} parallel; change --nproc-per-node or the sizes")
    return parallel


def run(argv: Sequence[str]) -> None:
    """Everything behind the command line."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that clean-up runs
    {"import": _import, "export": _export, "verify": _verify}[args.command](args)


def _import(args: argparse.Namespace) -> None:
    parallel, padding = _layout(args), given_fields(args, ModelConfig)
    from megatron_groupdpo.convert.hf.hub import model_folder
    from megatron_groupdpo.convert.importing import MODEL_YAML, ImportOptions, import_hf, prepare_import

    options = ImportOptions(
        **padding,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        with_tokenizer=not args.no_tokenizer,
        overwrite=args.overwrite,
    )
    folder = model_folder(args.hf)
    _, model, _ = prepare_import(folder, args.save, options)  # refused before anything starts
    check_divides(model, parallel)
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    ranks = initialize(parallel, seed=0)
    report = import_hf(folder, args.save, options, ranks, parallel=parallel)
    if ranks.is_logger:
        for name in report.source.ignored:
            print(f"ignored: {name}")
        tokenizer = "with its tokenizer" if report.has_tokenizer else "without a tokenizer"
        architecture = report.source.family.architecture
        print(f"{architecture} imported to {report.checkpoint} ({_name(report.dtype)}, {tokenizer})")
        print(f"model section for a run's configuration: {report.checkpoint / MODEL_YAML}", flush=True)
    shut_down()


def _export(args: argparse.Namespace) -> None:
    from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint, parse_size

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("export reads a checkpoint tensor by tensor in one process; start it with python")
    options = ExportOptions(
        family=args.family, dtype=args.dtype, max_shard_size=parse_size(args.max_shard_size), overwrite=args.overwrite
    )
    report = export_checkpoint(
        args.load, args.hf, options, tokenizer=args.tokenizer, with_tokenizer=not args.no_tokenizer
    )
    for note in report.notes:
        print(note)
    tokenizer = "with its tokenizer" if report.has_tokenizer else "without a tokenizer (give one with --tokenizer)"
    print(
        f"{report.architecture} exported to {report.folder} ({_name(report.dtype)}, {report.num_bytes:,} bytes "
        f"in {report.num_files} file{'s' * (report.num_files > 1)}, {tokenizer})"
    )


def _verify(args: argparse.Namespace) -> None:
    parallel, precision = _layout(args), PrecisionConfig(**given_fields(args, PrecisionConfig))
    from megatron_groupdpo.convert import verify
    from megatron_groupdpo.convert.hf.hub import model_folder
    from megatron_groupdpo.convert.hf.model import open_hf_model

    source = open_hf_model(model_folder(args.hf))
    check_divides(source.model, parallel)
    positions, vocab_size = source.model.max_position_embeddings, source.model.vocab_size
    assert vocab_size is not None
    length = args.seq_length
    if length is None:
        length = min(64, positions) if args.text is None else positions
    verify.check_length(positions, length)
    count = max(1, args.num_sequences)
    text: Any = None
    if args.text is None:
        sequences = verify.random_sequences(vocab_size, count=count, length=length, seed=args.seed)
    else:
        sequences, text = verify.text_sequences(args.text, source, args.tokenizer, count=count, length=length)
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    ranks = initialize(parallel, seed=0)
    result = verify.verify_on_layout(
        source,
        args.load,
        sequences,
        parallel=parallel,
        precision=precision,
        ranks=ranks,
        tolerance=args.tolerance,
        text=text,
    )
    if ranks.is_logger:
        print(verify.describe(result), flush=True)
        if args.report is not None:
            layout = {name: getattr(parallel, name) for name in _SIZES}
            where = {"hf": str(args.hf), "checkpoint": args.load and str(args.load), "layout": layout}
            verify.write_report(args.report, result, **where, dtype="bf16" if precision.bf16 else "fp32")
    shut_down()
    if not result.passed:
        mean = "" if result.mean_tolerance is None else f", or on average by more than {result.mean_tolerance:.3g}"
        raise CheckpointError(
            f"{args.load or 'the imported model'} and {args.hf} are not the same model: their log-probabilities differ "
            f"by more than {result.tolerance:.3g}{mean}; convert again"
        )


def check_divides(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        ConfigError: the size and what it must divide.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for size, option, number, what in (
        (tensor, "--tensor-model-parallel-size", model.num_attention_heads, "attention heads"),
        (tensor, "--tensor-model-parallel-size", model.ffn_hidden_size or 4 * model.hidden_size, "rows of the MLP"),
        (stages, "--pipeline-model-parallel-size", model.num_layers, "layers"),
    ):
        if number % size:
            raise ConfigError(f"{option} ({size}) must divide the model's {number} {what}; choose another")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Console entry."""
    run_entry(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
