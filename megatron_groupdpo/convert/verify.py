"""Per-token log-probabilities of the same tokens under ``transformers`` and under Megatron, in fp32.

A reward is a difference of log-probabilities, so closeness is asked of these and not of logits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.model import HfModel
from megatron_groupdpo.convert.weights.loading import check_same_model, fill_on_all_ranks
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common
from megatron_groupdpo.mcore.policy import Policy, build_policy, load_policy
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.processes import errors_reach_all_ranks
from megatron_groupdpo.types import Microbatch

TOLERANCE = 1e-4
"""Largest difference of one token's log-probability, in fp32."""
BF16_MAX, BF16_MEAN = 4.0, 1.5
"""With Megatron's side in bf16: how many times as far from ``transformers`` in fp32 as ``transformers`` in bf16 is."""
_AT_ONCE = 8
"""Sequences of one schedule call on a rank."""
_BEFORE = 20
"""Tokens shown before the worst one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """Where the two differ most."""

    sequence: int
    position: int
    """The predicted token's, from 0; token 0 has no prediction."""
    token_id: int
    token: str | None
    """Its text, where the comparison is of text."""
    before: str | None
    """The text it follows, its end."""
    transformers: float | None
    """None: not a number."""
    megatron: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences of log-probabilities, in nats."""

    num_sequences: int
    num_tokens: int
    max_difference: float | None
    """None: not a number."""
    mean_difference: float | None
    worst: WorstToken
    tolerance: float
    """Of the largest difference."""
    mean_tolerance: float | None
    passed: bool
    weights_rounded_to: str | None = None
    """What the Hugging Face model's weights are in, where the checkpoint's are finer and were rounded first."""


def random_sequences(vocab_size: int, *, count: int, length: int, seed: int) -> list[np.ndarray]:
    """Token ids drawn uniformly: ``count`` arrays [length] int64."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, size=length, dtype=np.int64) for _ in range(count)]


def text_sequences(
    file: Path, source: HfModel, tokenizer: str | None, *, count: int, length: int
) -> tuple[list[np.ndarray], Callable[[Sequence[int]], str]]:
    """The first ``count`` lines of a text file as token ids, each cut to ``length``; and what makes them text again.

    Raises:
        DataError: the file or the tokenizer cannot be read, or no line has two tokens.
        CheckpointError: the given tokenizer is not the model's own.
    """
    if tokenizer is None and not tokenizers.has_tokenizer(source.folder):
        raise DataError(f"{source.folder} has no tokenizer to read {file} with; give one with --tokenizer")
    options = tokenizers.options_for(str(source.folder) if tokenizer is None else tokenizer)
    checked = tokenizers.load_checked(options, source.model)
    if tokenizer is not None:
        tokenizers.check_given(checked, tokenizers.of_folder(source.folder), str(source.folder))
    loaded = checked.tokenizer
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    ids = (np.array(loaded.encode(line)[:length], dtype=np.int64) for line in lines)
    sequences = [tokens for tokens in ids if len(tokens) > 1][:count]
    if not sequences:
        raise DataError(f"{file}: no line has two tokens or more, so there is nothing to compare")
    return sequences, loaded.decode


def check_length(model_positions: int, length: int) -> None:
    """Refuse sequences longer than the model has positions for."""
    if not 2 <= length <= model_positions:
        raise ConfigError(f"--seq-length must be between 2 and the model's {model_positions} positions, got {length}")


def verify_on_layout(
    source: HfModel,
    checkpoint: Path | None,
    sequences: Sequence[np.ndarray],
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Ranks,
    tolerance: float | None = None,
    text: Callable[[Sequence[int]], str] | None = None,
) -> Comparison:
    """Compare on this launch's layout; the same answer on every rank.

    The rank that holds the output layer and writes the logs runs ``transformers``, before Megatron's model is built.

    Args:
        source: the Hugging Face model.
        checkpoint: a distributed checkpoint of it; none: ``source`` itself is loaded.
        sequences: token ids.
        parallel: the layout, one replica.
        precision: of Megatron's side.
        ranks: of this process.
        tolerance: largest difference; none: :data:`TOLERANCE` in fp32, by :func:`bf16_tolerances` in bf16.
        text: token ids to text, for the worst token.

    Raises:
        CheckpointError: the checkpoint is of another model or tokenizer, or broken.
    """
    rounded = False
    theirs, limits = None, (TOLERANCE if tolerance is None else tolerance, None)
    with errors_reach_all_ranks():
        if ranks.is_logger:
            theirs = transformers_logprobs(source.folder, sequences)
            if precision.bf16 and tolerance is None:
                limits = bf16_tolerances(theirs, transformers_logprobs(source.folder, sequences, torch.bfloat16))
    if checkpoint is None:
        policy = build_policy(source.model, parallel, precision, ranks, seed=None, training=False)
        fill_on_all_ranks(policy, source)
    else:
        with errors_reach_all_ranks():
            _check_tokenizers(source, checkpoint)
        policy = load_policy(checkpoint, parallel, precision, ranks)
        check_same_model(source, policy.model)
        rounded = _round_to(policy, source.dtype)
    ours = megatron_logprobs(policy, sequences)
    answers: list[Any] = [None] * dist.get_world_size()
    own = None
    if theirs is not None:
        assert ours is not None, "the logging rank is on the last stage"
        own = compare(sequences, theirs, ours, tolerance=limits[0], mean_tolerance=limits[1], text=text)
        if rounded:
            own = dataclasses.replace(own, weights_rounded_to=str(source.dtype).removeprefix("torch."))
    dist.all_gather_object(answers, own)
    return next(answer for answer in answers if answer is not None)


def _check_tokenizers(source: HfModel, checkpoint: Path) -> None:
    """Refuse a folder whose tokenizer is not the checkpoint's, though the weights may agree."""
    recorded = read_common(find_checkpoint(checkpoint))["config"].get("tokenizer")
    own = tokenizers.of_folder(source.folder)
    if recorded and own is not None:
        tokenizers.check_same(recorded, own, str(source.folder), remedy="export the checkpoint again")


@torch.no_grad()
def _round_to(policy: Policy, dtype: torch.dtype) -> bool:
    """Round finer weights to the dtype that an export had them in; whether any was changed on any rank."""
    changed = torch.zeros((), dtype=torch.int64, device=policy.ranks.device)
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            rounded = parameter.to(dtype).to(parameter.dtype)
            changed += (rounded != parameter).any()
            parameter.copy_(rounded)
    dist.all_reduce(changed)
    return bool(changed)


def bf16_tolerances(exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> tuple[float, float]:
    """Of the largest and the mean difference, from ``transformers``' own: in fp32 and in bf16, of the same tokens."""
    own_T = (torch.cat(list(rounded)).double() - torch.cat(list(exact)).double()).abs()
    return BF16_MAX * float(own_T.max()), BF16_MEAN * float(own_T.mean())


def transformers_logprobs(
    folder: Path, sequences: Sequence[np.ndarray], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Log-probability of tokens 1.. of each sequence, [length - 1] float32, under ``transformers``."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval()
    logprobs = []
    for tokens in tqdm(sequences, desc="transformers", unit=" sequences", delay=2.0, leave=False):
        tokens_S = torch.from_numpy(tokens)
        with torch.no_grad():
            logits_SV = model(input_ids=tokens_S[None], use_cache=False).logits[0].float()
        logprobs.append(logits_SV[:-1].log_softmax(-1).gather(1, tokens_S[1:, None])[:, 0])
    return logprobs


def megatron_logprobs(policy: Policy, sequences: Sequence[np.ndarray]) -> list[Tensor] | None:
    """The same under a policy, on any tensor- and pipeline-parallel layout; None except on the last stage."""
    assert policy.ranks.cp_group.size() == 1, "sequences are not cut"
    longest = max(len(tokens) for tokens in sequences)
    lengths = [len(tokens) - 1 for tokens in sequences]
    microbatches, first = [], 0
    for tokens in sequences:
        microbatches.append(_microbatch(torch.from_numpy(tokens), first=first, length=longest))
        first += len(tokens) - 1
    # Ranks that share experts and nothing else take different sequences, as many each.
    count, rank = policy.ranks.dp_group.size(), policy.ranks.dp_group.rank()
    if count > 1:
        microbatches += [_without_targets(microbatches[0])] * (-len(microbatches) % count)
    parts: list[Tensor] = []
    mine = microbatches[rank::count]
    logprobs_T = None
    for index in tqdm(range(0, len(mine), _AT_ONCE), desc="megatron", unit=" batches", delay=2.0, leave=False):
        part_T = policy.engine.score(mine[index : index + _AT_ONCE], first)
        parts += [] if part_T is None else [part_T]
    if parts:
        logprobs_T = torch.stack(parts).sum(0)
    return None if logprobs_T is None else list(logprobs_T.cpu().split(lengths))


def _microbatch(tokens_S: Tensor, *, first: int, length: int) -> Microbatch:
    """One padded sequence whose every token is a response of its own: scores are then log-probabilities of tokens."""
    num_targets = len(tokens_S) - 1
    padded_BS = torch.zeros((1, length), dtype=torch.int64)
    padded_BS[0, : len(tokens_S)] = tokens_S
    return Microbatch(
        tokens_BS=padded_BS,
        position_ids_BS=torch.arange(length)[None],
        hidden_positions_T=torch.arange(num_targets),
        targets_T=tokens_S[1:],
        owners_T=torch.arange(num_targets),
        responses_r=torch.arange(first, first + num_targets),
    )


def _without_targets(microbatch: Microbatch) -> Microbatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return dataclasses.replace(
        microbatch, hidden_positions_T=nothing, targets_T=nothing, owners_T=nothing, responses_r=nothing
    )


def compare(
    sequences: Sequence[np.ndarray],
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    *,
    tolerance: float = TOLERANCE,
    mean_tolerance: float | None = None,
    text: Callable[[Sequence[int]], str] | None = None,
) -> Comparison:
    """Largest and mean difference. A log-probability that is not a number on either side never passes."""
    both = [(their.double(), our.double()) for their, our in zip(theirs, ours, strict=True)]
    differences = [(their - our).abs() for their, our in both]
    flat_T = torch.cat(differences)
    place = int(flat_T.nan_to_num(nan=math.inf).argmax())
    sequence = 0
    while place >= len(differences[sequence]):
        place -= len(differences[sequence])
        sequence += 1
    largest, mean = float(differences[sequence][place]), float(flat_T.mean())
    return Comparison(
        num_sequences=len(sequences),
        num_tokens=flat_T.numel(),
        max_difference=_finite(largest),
        mean_difference=_finite(mean),
        worst=WorstToken(
            sequence=sequence,
            position=place + 1,
            token_id=int(sequences[sequence][place + 1]),
            token=None if text is None else text(sequences[sequence][place + 1 : place + 2].tolist()),
            before=None
            if text is None
            else text(sequences[sequence][max(0, place + 1 - _BEFORE) : place + 1].tolist()),
            transformers=_finite(float(both[sequence][0][place])),
            megatron=_finite(float(both[sequence][1][place])),
        ),
        tolerance=tolerance,
        mean_tolerance=mean_tolerance,
        passed=largest <= tolerance and mean <= (math.inf if mean_tolerance is None else mean_tolerance),  # not for NaN
    )


def _finite(value: float) -> float | None:
    # JSON has no NaN.
    return value if math.isfinite(value) else None


def write_report(file: Path, comparison: Comparison, **facts: Any) -> None:
    """The comparison as JSON, with what was compared."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**facts, **asdict(comparison)}, indent=2) + "\n")


def describe(comparison: Comparison) -> str:
    """The comparison in lines for people."""
    worst = comparison.worst
    bound = comparison.mean_tolerance
    of_mean = "" if bound is None else f" (tolerance {bound:.3g}); both from transformers' own difference in bf16"
    shown = f" ({worst.token!r} after {worst.before!r})" if worst.token is not None else ""
    finer = comparison.weights_rounded_to
    rounded = f"the checkpoint's weights are finer, and were rounded to {finer} as the model's are\n" if finer else ""
    return rounded + (
        f"{comparison.num_tokens} tokens of {comparison.num_sequences} sequences: difference of log-probabilities "
        f"max {_number(comparison.max_difference)} (tolerance {comparison.tolerance:.3g}), "
        f"mean {_number(comparison.mean_difference)}{of_mean}\n"
        f"worst token: id {worst.token_id}{shown} at position {worst.position} of sequence {worst.sequence}: "
        f"transformers {_number(worst.transformers, '.6f')}, megatron {_number(worst.megatron, '.6f')}"
    )


def _number(value: float | None, form: str = ".3g") -> str:
    return "not a number" if value is None else format(value, form)
