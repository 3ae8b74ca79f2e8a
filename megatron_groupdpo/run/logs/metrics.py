"""What a step and a validation report, from scores on the ranks that hold them.

Every metric is a numerator and a denominator, each a float64 sum over groups or responses. Batches are added up and
only then divided, so a validation does not depend on how its groups were cut into batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_groupdpo.step.coefficients import GroupLoss, LossOptions
from megatron_groupdpo.types import GroupBatch

# Where policy and reference are one model, scores differ from 0 by rounding; which way says nothing. Log-probabilities
# round at their own size, so the band grows with it.
_TIE = 1e-6

TRAINED = "trained/"
"""Before the name of a held-out metric: over the responses that training would read, not over all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a metric is made of; the table of docs/logs.md."""

    numerator: str
    denominator: str | None
    """None: a count, or a sum of metrics; it is not divided."""
    of_responses: bool = False
    """A held-out set has it twice, over all responses and over the trained ones."""


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "loss": Metric(numerator="preference_loss + nll_coeff x nll_loss of the trained responses", denominator=None),
        "preference_loss": Metric(numerator="sum of phi over active groups", denominator="active groups"),
        "nll_loss": Metric(
            numerator="sum over groups of the positives' mean -log p (of each, divided by its tokens with `response`); "
            "with `batch-tokens` the sum of -log p of positives",
            denominator="groups with a positive; with `batch-tokens` the tokens of positives",
            of_responses=True,
        ),
        "rewards/chosen": Metric(numerator="sum of scores of positives", denominator="positives", of_responses=True),
        "rewards/rejected": Metric(numerator="sum of scores of negatives", denominator="negatives", of_responses=True),
        "rewards/accuracies": Metric(
            numerator="sum over groups of the share of (positive, negative) pairs in the right order, a tie one half",
            denominator="two-sided groups",
            of_responses=True,
        ),
        "rewards/margins": Metric(
            numerator="sum over groups of the positives' mean score less the negatives'",
            denominator="two-sided groups",
            of_responses=True,
        ),
        "logps/chosen": Metric(numerator="sum of log p of positives", denominator="positives", of_responses=True),
        "logps/rejected": Metric(numerator="sum of log p of negatives", denominator="negatives", of_responses=True),
        "group/top1_accuracy": Metric(
            numerator="sum over groups of the positives' share of the responses that tie for the highest score",
            denominator="two-sided groups",
            of_responses=True,
        ),
        "group/logp_minus_ref": Metric(
            numerator="sum of log p - log p of the reference", denominator="responses", of_responses=True
        ),
        "group/mean_response_tokens": Metric(
            numerator="counted tokens of the responses", denominator="responses", of_responses=True
        ),
        "group/responses": Metric(numerator="responses", denominator=None, of_responses=True),
        "group/groups": Metric(numerator="groups", denominator=None),
        "group/active": Metric(numerator="groups with a preference term", denominator=None),
        "group/one_sided_rate": Metric(numerator="groups whose data lack a side", denominator="groups"),
    }
)
"""By name: the same in training and, after ``eval/``, in a validation."""


class Sums:
    """Numerator and denominator of each metric; two of them add up to those of all their groups."""

    def __init__(self, terms: Mapping[str, tuple[float, float]]) -> None:
        assert {name.removeprefix(TRAINED) for name in terms} <= METRICS.keys()
        self.terms = dict(terms)

    def __add__(self, other: Sums) -> Sums:
        names = [*self.terms, *(name for name in other.terms if name not in self.terms)]
        pairs = ((name, self.terms.get(name, (0.0, 0.0)), other.terms.get(name, (0.0, 0.0))) for name in names)
        return Sums({name: (a[0] + b[0], a[1] + b[1]) for name, a, b in pairs})

    def named(self, prefix: str) -> Sums:
        """The metrics of responses, under longer names."""
        return Sums({prefix + name: pair for name, pair in self.terms.items() if METRICS[name].of_responses})

    def values(self) -> dict[str, float]:
        """Each metric, in the order of :data:`METRICS`, trained ones last.

        One without a single term is left out, but the two terms of a loss are then 0.
        """
        found: dict[str, float] = {}
        for name in sorted(self.terms, key=_place):
            own_name, (numerator, denominator) = name.removeprefix(TRAINED), self.terms[name]
            if METRICS[own_name].denominator is None:
                found[name] = numerator
            elif denominator or own_name in ("preference_loss", "nll_loss"):
                found[name] = numerator / max(denominator, 1.0)
        return found


def _place(name: str) -> tuple[bool, int]:
    return name.startswith(TRAINED), list(METRICS).index(name.removeprefix(TRAINED))


def batch_metrics(
    batch: GroupBatch, result: GroupLoss, logps_R: Tensor, ref_logps_R: Tensor, options: LossOptions
) -> dict[str, float]:
    """Metrics of a global batch of training, under TRL's names, and ours under ``group/``.

    Rewards are the scores. All are over the responses that got a pass.
    """
    # To the host once: every number below would otherwise be a wait for the device of its own.
    result, logps_R, ref_logps_R = result.to_host(), logps_R.cpu(), ref_logps_R.cpu()
    sums = _loss_nll(result) + _group_sums(batch, result)
    sums += _response_sums(batch, result, logps_R, ref_logps_R, options, batch.flat_index_GK >= 0)
    return {"loss": float(result.loss)} | sums.values()


class HeldOutMetrics:
    """Metrics of a held-out set of which every response got a pass, whatever the objective reads.

    Those of responses are over all of them, for every objective alike. Where training would leave some out (``dpo``
    reads one pair of a group), they are there once more, under ``trained/``, over those that it would read.
    """

    def __init__(self, options: LossOptions) -> None:
        self._options = options
        self._sums = Sums({})

    def add(
        self, batch: GroupBatch, result: GroupLoss, logps_R: Tensor, ref_logps_R: Tensor, trained_GK: Tensor
    ) -> None:
        """``trained_GK``: [G, K] bool, the responses that a step of training on these groups would read."""
        result, logps_R, ref_logps_R = result.to_host(), logps_R.cpu(), ref_logps_R.cpu()
        held_GK = batch.flat_index_GK >= 0
        given = (batch, result, logps_R, ref_logps_R, self._options)
        self._sums += _group_sums(batch, result)
        self._sums += _response_sums(*given, held_GK) + _all_nll(batch, logps_R, self._options, held_GK)
        self._sums += (_response_sums(*given, held_GK & trained_GK) + _loss_nll(result)).named(TRAINED)

    def values(self) -> dict[str, float]:
        """By name, after ``eval/``; empty where nothing was added, as on ranks without the output layer."""
        if not self._sums.terms:
            return {}
        values = self._sums.values()
        loss = values["preference_loss"] + self._options.nll_coeff * values[f"{TRAINED}nll_loss"]
        if values["group/responses"] == values[f"{TRAINED}group/responses"]:
            values = {name: value for name, value in values.items() if not name.startswith(TRAINED)}
        return {f"eval/{name}": value for name, value in ({"loss": loss} | values).items()}


def _loss_nll(result: GroupLoss) -> Sums:
    """The NLL that is a term of the loss."""
    terms = float(result.nll_terms)
    return Sums({"nll_loss": (float(result.nll_loss) * max(terms, 1.0), terms)})


def _group_sums(batch: GroupBatch, result: GroupLoss) -> Sums:
    one_sided_G = ~((batch.labels_GK > 0).any(1) & (batch.labels_GK < 0).any(1))
    num_groups = float(batch.num_groups)
    return Sums(
        {
            "preference_loss": (float(result.loss_G.sum()), float(result.active_G.sum())),
            "group/groups": (num_groups, 1.0),
            "group/active": (float(result.active_G.sum()), 1.0),
            "group/one_sided_rate": (float(one_sided_G.sum()), num_groups),
        }
    )


def _response_sums(
    batch: GroupBatch,
    result: GroupLoss,
    logps_R: Tensor,
    ref_logps_R: Tensor,
    options: LossOptions,
    counted_GK: Tensor,
) -> Sums:
    """Sums over the responses of ``counted_GK`` [G, K], all of which have a score."""
    # NaN: a padding cell that got into a sum would show.
    scores_GK, logps_GK, ref_GK, tokens_GK = (
        batch.to_groups(values_R.double(), fill=float("nan"))
        for values_R in (result.scores_R, logps_R, ref_logps_R, batch.num_tokens_R)
    )
    positive_GK, negative_GK = counted_GK & (batch.labels_GK > 0), counted_GK & (batch.labels_GK < 0)
    two_sided_G = positive_GK.any(1) & negative_GK.any(1)
    size_GK = options.beta * logps_GK.abs() / (tokens_GK.clamp_min(1) if options.score_average else 1)
    band_GK = _TIE * size_GK.clamp_min(1)
    cells = {
        "rewards/chosen": (scores_GK, positive_GK),
        "rewards/rejected": (scores_GK, negative_GK),
        "logps/chosen": (logps_GK, positive_GK),
        "logps/rejected": (logps_GK, negative_GK),
        "rewards/accuracies": (_pairwise_accuracy(scores_GK, band_GK, positive_GK, negative_GK), two_sided_G),
        "rewards/margins": (_mean(scores_GK, positive_GK) - _mean(scores_GK, negative_GK), two_sided_G),
        "group/top1_accuracy": (_top1(scores_GK, band_GK, counted_GK, positive_GK), two_sided_G),
        "group/mean_response_tokens": (tokens_GK, counted_GK),
    }
    if bool((ref_logps_R != 0).any()):
        # Responses come from elsewhere, so this is no unbiased estimate of KL; it shows drift from the reference.
        cells["group/logp_minus_ref"] = (logps_GK - ref_GK, counted_GK)
    sums = {name: (float(values[where].sum()), float(where.sum())) for name, (values, where) in cells.items()}
    return Sums({**sums, "group/responses": (float(counted_GK.sum()), 1.0)})


def _all_nll(batch: GroupBatch, logps_R: Tensor, options: LossOptions, counted_GK: Tensor) -> Sums:
    """The NLL of all positives that are counted, also where the loss leaves them out."""
    positive_GK = counted_GK & (batch.labels_GK > 0)
    nll_GK, tokens_GK = (batch.to_groups(values_R.double()) for values_R in (-logps_R, batch.num_tokens_R))
    if options.nll_average == "batch-tokens":
        # A response whose tokens are all masked counts as one, as in the loss.
        pair = (nll_GK[positive_GK].sum(), tokens_GK[positive_GK].clamp_min(1).sum())
    else:
        own_GK = nll_GK / tokens_GK.clamp_min(1) if options.nll_average == "response" else nll_GK
        pair = (_mean(own_GK, positive_GK)[positive_GK.any(1)].sum(), positive_GK.any(1).sum())
    return Sums({"nll_loss": (float(pair[0]), float(pair[1]))})


def _mean(values_GK: Tensor, where_GK: Tensor) -> Tensor:
    return values_GK.masked_fill(~where_GK, 0.0).sum(1) / where_GK.sum(1).clamp_min(1)


def _pairwise_accuracy(scores_GK: Tensor, band_GK: Tensor, positive_GK: Tensor, negative_GK: Tensor) -> Tensor:
    """[G]: share of (positive, negative) pairs in the right order; a tie, rounding aside, counts half."""
    pairs_GPN = positive_GK[:, :, None] & negative_GK[:, None, :]
    gaps_GPN = scores_GK[:, :, None] - scores_GK[:, None, :]
    band_GPN = torch.maximum(band_GK[:, :, None], band_GK[:, None, :])
    right_GPN = (gaps_GPN > band_GPN).double() + 0.5 * (gaps_GPN.abs() <= band_GPN).double()
    return (right_GPN * pairs_GPN).sum((1, 2)) / pairs_GPN.sum((1, 2)).clamp_min(1)


def _top1(scores_GK: Tensor, band_GK: Tensor, counted_GK: Tensor, positive_GK: Tensor) -> Tensor:
    """[G]: the positives' share of the responses that tie, rounding aside, for the highest score."""
    best_G = scores_GK.masked_fill(~counted_GK, float("-inf")).amax(1)
    tied_GK = counted_GK & (best_G[:, None] - scores_GK <= band_GK)
    return (tied_GK & positive_GK).sum(1) / tied_GK.sum(1).double()
