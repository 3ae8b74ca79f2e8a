"""Global batches of a run, in order: sampler, batch, plan, microbatches of this rank, reference log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batch import build_batch
from megatron_groupdpo.data.dataset import GroupDataset
from megatron_groupdpo.data.microbatches import build_microbatches
from megatron_groupdpo.data.planner import PlanOptions, plan_batch, plan_whole_groups
from megatron_groupdpo.data.sampler import Sampler
from megatron_groupdpo.reference.store import ReferenceLogProbs
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.types import GroupBatch, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """A global batch with this data-parallel rank's part of the work."""

    batch: GroupBatch
    microbatches: list[Microbatch]
    ref_logps_R: torch.Tensor
    """[R] float64 on the host; zeros where nothing is read from disk."""
    num_tokens: int
    """Prompt and response tokens of the global batch, padding excluded."""
    group_ids: list[int]


class BatchSource:
    """Makes the batch of any place in the order; every rank makes the same one."""

    def __init__(
        self,
        dataset: GroupDataset,
        group_ids: Sequence[int] | np.ndarray,
        *,
        loss: LossOptions,
        plan: PlanOptions,
        sampler: Sampler,
        seed: int,
        data_parallel_rank: int,
        context_parallel_rank: int = 0,
        reference: ReferenceLogProbs | None,
    ) -> None:
        self.dataset = dataset
        self.group_ids = np.asarray(group_ids)
        self.loss = loss
        self.plan = plan
        self.data_parallel_rank = data_parallel_rank
        self.context_parallel_rank = context_parallel_rank
        self.seed = seed
        self.sampler = sampler
        self.reference = reference

    def batch(self, consumed_groups: int, num_groups: int) -> PlannedBatch:
        """The ``num_groups`` groups after the first ``consumed_groups``."""
        taken = self.sampler.take(consumed_groups, num_groups)
        ids = [int(self.group_ids[index]) for index, _ in taken]
        samples = [self.dataset[group_id] for group_id in ids]
        keys_G = torch.cat(
            [
                objectives.group_keys(torch.tensor([group_id]), seed=self.seed, epoch=epoch)
                for group_id, (_, epoch) in zip(ids, taken)
            ]
        )
        batch = build_batch(samples, group_keys_G=keys_G, needs_pass=self._needs_pass)
        planned = PlannedBatch(
            batch=batch,
            microbatches=self.microbatches(batch),
            ref_logps_R=torch.zeros(batch.num_responses, dtype=torch.float64),
            num_tokens=sum(len(row.tokens_S) for row in batch.rows),
            group_ids=ids,
        )
        return self.with_reference(planned)

    def with_reference(self, planned: PlannedBatch) -> PlannedBatch:
        """The batch with the stored reference log-probabilities, where there are any."""
        if self.reference is None:
            return planned
        ref_logps_R = self.reference[planned.batch.response_ids_R.numpy()]
        return replace(planned, ref_logps_R=torch.from_numpy(ref_logps_R))

    def without_reference(self) -> BatchSource:
        """A copy to make batches elsewhere, and :meth:`with_reference` here."""
        other = copy(self)
        other.reference = None
        return other

    def microbatches(self, batch: GroupBatch, *, whole_groups: bool = False) -> list[Microbatch]:
        """This rank's microbatches; with ``whole_groups`` each holds one group, for a loss that is not decoupled."""
        plan = plan_whole_groups(batch, self.plan) if whole_groups else plan_batch(batch, self.plan)
        return build_microbatches(
            plan, self.plan, rank=self.data_parallel_rank, context_rank=self.context_parallel_rank
        )

    def once(self, num_groups: int, *, limit: int | None = None) -> Iterator[PlannedBatch]:
        """Every group once, in order, ``num_groups`` at a time (the last batch may be short)."""
        total = len(self.group_ids)
        count = -(-total // num_groups)
        for index in range(count if limit is None else min(limit, count)):
            start = index * num_groups
            yield self.batch(start, min(num_groups, total - start))

    def _needs_pass(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """The responses the loss reads: those of the objective, and the positives that carry an NLL of their own."""
        options = self.loss
        used_GK = objectives.used_responses(options.objective, **given, **options.hyperparameters)
        if options.one_sided_nll and options.nll_coeff:
            used_GK = used_GK | objectives.nll_responses(options.objective, **given, **options.hyperparameters)
        return used_GK
