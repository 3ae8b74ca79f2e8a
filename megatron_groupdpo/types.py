"""The words of the project, as types, and the legend for shape suffixes.

Shape legend, used in names and first comments everywhere (``scores_GK``):
    G  groups of the global batch            K  responses of a group (padded to the largest group)
    R  responses of the global batch, flat   r  responses of one microbatch
    B  rows of a microbatch
    S  sequence positions                    T  selected token positions (the response tokens)
    H  hidden size                           V  vocabulary (local shard under tensor parallelism)

A *value* is what the data say about a response (a reward, a rating, a negated rank): higher is better.
A *score* is what the policy says: ``s = beta * (log pi - log pi_ref)``. The two are never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_groupdpo.lazy_torch import torch

POSITIVE, NEGATIVE, PADDING = 1, -1, 0
"""Labels of a response inside a group; 0 marks a cell of a padded [G, K] array that holds no response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat turn."""

    role: str
    content: str
    extra: str = ""
    """JSON object of its other fields, which the chat template sees (``reasoning_content``, ``tool_calls``, ...).
    ``"content": null`` in it: the record gives no content, and ``content`` is empty."""
    trained: bool | None = None
    """What the record says about training on this turn; None: nothing."""


Text = str | tuple[Message, ...]
"""Plain text, or chat messages in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRecord:
    """One response as a file gives it. ``None`` means the file does not say."""

    text: Text
    value: float | None = None
    """Reward or rating, higher is better. A rank r (1 is best) is stored as ``-r``."""
    label: int | None = None
    """+1 positive, -1 negative."""
    ref_logp: float | None = None
    """Summed log-probability under the reference, if the file carries it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """One prompt with its responses, as a file gives it."""

    prompt: Text
    responses: tuple[ResponseRecord, ...]
    where: str
    """``file:line`` (or ``file:row`` for columnar files), for error messages."""
    tools: str = ""
    """JSON list of the tools that the chat template shows; empty: none."""
    template_arguments: str = ""
    """JSON object of further arguments of the chat template; empty: none."""
    is_rendered: bool = False
    """Whether the texts are a chat template's output, so that control tokens spelled in them are meant."""
    unread: tuple[str, ...] = ()
    """Unknown fields that hold text or messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSample:
    """One tokenized group, read from a token store.

    All arrays have K rows, one per response, in the order of the file.
    """

    group_id: int
    """Row of the group in its store."""
    first_response_id: int
    """Row of response 0 in the store's flat response table; response k has ``first_response_id + k``."""
    prompt_tokens: np.ndarray
    """[P] int32."""
    response_tokens: tuple[np.ndarray, ...]
    """K arrays [L_k] int32, the end token included; every one of these tokens is trained on, unless masked."""
    response_masks: tuple[np.ndarray | None, ...]
    """K arrays [L_k] bool, False where a token is context (another speaker's turn); None: all True."""
    labels_K: np.ndarray
    """[K] int8: +1 or -1."""
    values_K: np.ndarray
    """[K] float32; NaN where the data give no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRow:
    """The unit of work: one response with its prompt, ready to be placed in a microbatch."""

    index: int
    """Position in the flat [R] order of the global batch."""
    tokens_S: np.ndarray
    """[S] int32: prompt then response."""
    target_positions_T: np.ndarray
    """[T] int64: positions t >= 1 in ``tokens_S`` whose token's log-probability counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """A global batch: the same object on every rank, built from the seed and ``consumed_groups`` alone."""

    rows: tuple[ResponseRow, ...]
    """[R] responses that get a pass."""
    flat_index_GK: torch.Tensor
    """[G, K] int64: position of the response in the flat order; -1 in padding cells."""
    labels_GK: torch.Tensor
    """[G, K] int8: +1, -1, 0."""
    values_GK: torch.Tensor
    """[G, K] float64; NaN where absent."""
    tie_keys_GK: torch.Tensor
    """[G, K] int64: content hash of each response, which breaks ties among equal values."""
    group_keys_G: torch.Tensor
    """[G] int64: source of each group's random draws."""
    response_ids_R: torch.Tensor
    """[R] int64: rows of the store's response table (the key into a reference store)."""
    num_tokens_R: torch.Tensor
    """[R] int64: counted response tokens ``|y|``."""

    @property
    def num_groups(self) -> int:
        """G."""
        return self.labels_GK.shape[0]

    @property
    def num_responses(self) -> int:
        """R."""
        return len(self.rows)

    def responses_of(self, groups: Sequence[int]) -> torch.Tensor:
        """[r] int64: flat indices of the responses of these groups, in their order in :meth:`select`."""
        index_GK = self.flat_index_GK[list(groups)]
        return index_GK[index_GK >= 0]

    def select(self, groups: Sequence[int]) -> GroupBatch:
        """The batch of these groups alone, its responses numbered anew."""
        chosen = list(groups)
        own_R = self.responses_of(chosen)
        held_GK = self.flat_index_GK[chosen] >= 0
        flat_index_GK = torch.full(held_GK.shape, -1, dtype=torch.int64)
        flat_index_GK[held_GK] = torch.arange(len(own_R))
        return GroupBatch(
            rows=tuple(replace(self.rows[old], index=new) for new, old in enumerate(own_R.tolist())),
            flat_index_GK=flat_index_GK,
            labels_GK=self.labels_GK[chosen],
            values_GK=self.values_GK[chosen],
            tie_keys_GK=self.tie_keys_GK[chosen],
            group_keys_G=self.group_keys_G[chosen],
            response_ids_R=self.response_ids_R[own_R],
            num_tokens_R=self.num_tokens_R[own_R],
        )

    def to_groups(self, per_response_R: torch.Tensor, *, fill: float = 0.0) -> torch.Tensor:
        """Arrange a flat [R] vector as [G, K], with ``fill`` in the padding cells."""
        if per_response_R.numel() == 0:
            return torch.full(self.flat_index_GK.shape, fill, dtype=per_response_R.dtype, device=per_response_R.device)
        index_GK = self.flat_index_GK.to(per_response_R.device)
        gathered_GK = per_response_R[index_GK.clamp_min(0)]
        return torch.where(index_GK >= 0, gathered_GK, torch.full_like(gathered_GK, fill))


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What one call of the model sees: some responses, padded to [B, S], or packed to [1, S].

    Under context parallelism S and T are this rank's part, ``responses_r`` and ``cu_seqlens`` are whole.
    """

    tokens_BS: torch.Tensor
    """[B, S] int64."""
    position_ids_BS: torch.Tensor
    """[B, S] int64; restarts at 0 at every packed response; 0 for padding."""
    hidden_positions_T: torch.Tensor
    """[T] int64: indices into the model's hidden states flattened from [S, B]; state t predicts token t+1."""
    targets_T: torch.Tensor
    """[T] int64: the tokens predicted there."""
    owners_T: torch.Tensor
    """[T] int64: which of ``responses_r`` each token belongs to."""
    responses_r: torch.Tensor
    """[r] int64: flat indices (R) of the responses in it; empty in a microbatch that only fills the schedule."""
    cu_seqlens: torch.Tensor | None = None
    """[n+1] int32, always on the host: boundaries of packed responses before context parallelism cuts them; None when
    padded."""
