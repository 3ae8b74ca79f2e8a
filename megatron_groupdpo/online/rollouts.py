"""Groups from the policy itself: sample responses to each prompt, let a verifier score them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.generate import SampledResponse, SamplingOptions, sample
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.online.problems import Problem
from megatron_groupdpo.online.verifiers import Verifier


def rollout_groups(
    policy: Policy,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    num_samples_per_prompt: int,
    options: SamplingOptions,
    verifier: Verifier,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """One group record (canonical schema) per problem; ``score`` in [0, 1] and ``label`` are the verifier's.

    Args:
        policy: see :func:`megatron_groupdpo.mcore.generate.sample`.
        tokenizer: the policy's own; its end token ends a response.
        problems: what to answer; the worked solution is not looked at.
        num_samples_per_prompt: N, responses per prompt.
        options: how to draw.
        verifier: scores a response given the known answer.
        on_done: called with the number of responses just finished.

    Raises:
        ConfigError: the tokenizer has no end token, or the layout cannot sample.
    """
    if tokenizer.eos_id is None:
        raise ConfigError("the tokenizer has no end token, so no response would ever end; use one that has it")
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    tokens, keys = [], []
    for problem in problems:
        ids = np.array([*start, *tokenizer.encode(problem.prompt)], dtype=np.int32)
        for n in range(num_samples_per_prompt):
            tokens.append(ids)
            # By content, so that a prompt's responses do not depend on which other prompts are sampled.
            keys.append((zlib.crc32(problem.prompt.encode()) << 16) + n)
    responses = sample(policy, tokens, keys, options, end_token=tokenizer.eos_id, on_done=on_done)
    groups = []
    for index, problem in enumerate(problems):
        own = responses[index * num_samples_per_prompt : (index + 1) * num_samples_per_prompt]
        groups.append(_record(problem, own, tokenizer, verifier))
    return groups


def _record(
    problem: Problem, responses: Sequence[SampledResponse], tokenizer: Tokenizer, verifier: Verifier
) -> dict[str, Any]:
    given = []
    for response in responses:
        tokens = response.tokens[:-1] if response.finished else response.tokens
        text = tokenizer.decode([int(token) for token in tokens])
        verdict = verifier(text, problem.answer)
        given.append({"text": text, "score": verdict.score, "label": verdict.label, "finished": response.finished})
    return {"prompt": problem.prompt, "answer": problem.answer, "responses": given}
