"""The same gradient the usual way: each group whole in one microbatch, its loss differentiated through all responses.

This is what GroupDPO avoids: activations of K responses at a time. It serves to check the two passes
(``--verify-gradients``) and to measure against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_groupdpo.engine import Engine
from megatron_groupdpo.step.coefficients import LossOptions, LossPlan, coupled_loss, plan_loss
from megatron_groupdpo.tensors import to_device
from megatron_groupdpo.types import GroupBatch, Microbatch


def accumulate_coupled_gradient(
    engine: Engine,
    microbatches: Sequence[Microbatch],
    batch: GroupBatch,
    ref_logps_R: Tensor,
    options: LossOptions,
) -> Tensor | None:
    """Leave dL/dparameters in the engine's gradient buffers; log-probabilities [R] where the output layer is.

    Args:
        engine: the model.
        microbatches: of :func:`megatron_groupdpo.data.batches.planner.plan_whole_groups`: no group is split.
        batch: the global batch.
        ref_logps_R: [R] float64.
        options: the loss.
    """
    loss = _CoupledLoss(batch=batch, ref_logps_R=ref_logps_R, options=options)
    return engine.backward(microbatches, batch.num_responses, loss)


@dataclass(slots=True, kw_only=True)
class _CoupledLoss:
    batch: GroupBatch
    ref_logps_R: Tensor
    options: LossOptions
    plan: LossPlan | None = field(default=None, init=False)

    def __call__(self, responses_r: Tensor, logps_r: Tensor) -> Tensor:
        if self.plan is None:
            self.plan = plan_loss(self.batch, self.options, logps_r.device)
            self.ref_logps_R = to_device(self.ref_logps_R, logps_r.device)
        # The other groups stand at the reference: constants, since no group's loss reads another's responses and the
        # denominators follow from the data.
        logps_R = self.ref_logps_R.index_copy(0, responses_r, logps_r)
        return coupled_loss(logps_R, self.ref_logps_R, self.batch, self.options, plan=self.plan)
