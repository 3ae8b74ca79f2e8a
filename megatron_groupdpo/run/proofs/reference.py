"""Stored reference log-probabilities, checked at load against the weights that are said to have made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_groupdpo.config import TrainConfig
from megatron_groupdpo.convert.start_weights import find_weights
from megatron_groupdpo.errors import CheckpointError, ConfigError, DataError
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.reference.score import score_groups
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.run.proofs.tolerances import logp_tolerance, shown


def probe_reference(
    config: TrainConfig, policy: Policy, sources: Sequence[BatchSource], *, policy_from: Path | None
) -> str | None:
    """Score a few seeded groups of each dataset with the weights of ``pretrained_checkpoint``, if those are the
    reference's; None, or why that was not possible.

    ``policy`` serves as the reference and is left with its weights: no second model is built. Load its own next.

    Args:
        config: the run's.
        policy: not loaded yet.
        sources: with reference log-probabilities.
        policy_from: the checkpoint the policy will have.

    Raises:
        DataError: a stored number is not what the weights give; both are named.
    """
    given, stored = config.checkpoint.pretrained_checkpoint, sources[0].reference
    assert stored is not None
    if given is None:
        return "pretrained_checkpoint, which could name the weights that scored it, is not given"
    try:
        weights = find_weights(given)
        weights.check(policy.model)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    folder = weights.folder
    if folder == policy_from:
        return f"the weights that scored it ({stored.weights_digest}) are not those of {folder}, the policy's own"
    weights.load_into(policy)
    digest = policy.weights_digest()
    if digest != stored.weights_digest:
        return f"{folder} has weights {digest}, it was scored by {stored.weights_digest}"
    num_groups, gaps = 0, []
    for source in {id(source.dataset): source for source in sources}.values():
        size = min(config.objective.reference_probe_groups, len(source.dataset))
        chosen = np.random.default_rng(config.training.seed).choice(len(source.dataset), size, replace=False)
        gaps.append(_check_groups(config, policy, source, np.sort(chosen).tolist(), folder))
        num_groups += size
    if policy.ranks.is_logger:
        print(
            f"reference: {num_groups} groups scored again by {folder}; largest difference {max(gaps):.1e} per token, "
            f"{shown(logp_tolerance(config))}",
            flush=True,
        )
    return None


def _check_groups(
    config: TrainConfig, policy: Policy, source: BatchSource, group_ids: Sequence[int], folder: Path
) -> float:
    """The largest difference per token."""
    assert source.reference is not None
    batch, logps_R = score_groups(policy, [source.dataset[group_id] for group_id in group_ids], source.plan)
    found = torch.zeros(4, dtype=torch.float64, device=policy.ranks.device)
    if logps_R is not None:
        stored_R = torch.from_numpy(source.reference[batch.response_ids_R.numpy()]).to(logps_R.device)
        gaps_R = (logps_R - stored_R).abs() / batch.num_tokens_R.to(logps_R.device).clamp_min(1)
        worst = int(gaps_R.argmax())  # of NaN and numbers, NaN
        found[:] = torch.stack([gaps_R[worst], logps_R[worst], stored_R[worst], gaps_R.new_tensor(worst)])
    per_token, ours, theirs, worst = policy.ranks.broadcast_from_last_stage(found).tolist()
    tolerance = logp_tolerance(config)
    if tolerance is not None and not per_token <= tolerance:
        row, k = (int(place) for place in (batch.flat_index_GK == int(worst)).nonzero()[0])
        raise DataError(
            f"{source.dataset.where(group_ids[row])}: response {k} has reference log-probability {theirs:.6f} in "
            f"{config.objective.reference_logprobs}, but {ours:.6f} by {folder}, whose weights scored it "
            f"({per_token:.2e} per token, tolerance {tolerance:.0e}); score the data anew into an empty folder with "
            "tools/score_reference.py"
        )
    return per_token
