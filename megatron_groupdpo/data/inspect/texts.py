"""What can be wrong with one group's texts and tokens: template mistakes, duplicates, empty responses.

A *finding* is a code of ``warnings.RULES`` with the number of groups or responses of this group it was met in.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, GroupSample, Message, Text

_MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<<SYS>>", "<</SYS>>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip
_SPEAKER_LINES = r"^(?:Human|User|Assistant): |^### (?:Instruction|Response|Input):"
ROLE_MARKERS = re.compile("|".join([*map(re.escape, _MARKERS), _SPEAKER_LINES]), re.MULTILINE)
"""Turn markers of the chat templates in use, and of plain-text dialogues."""
# where no tokenizer says what its own are
_CONTROL_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<bos>", "<eos>", "</s>")
_SENTINEL = "qqqq"
_JOIN_TOKENS = 8  # tokens decoded on either side of the border between prompt and response


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFindings:
    """What one group gives to the tally."""

    prompt_key: int
    """64-bit hash of the prompt."""
    findings: Counter[str]
    end_tokens: Counter[int]
    """Ids of the last token of each response; empty for records."""


class TextCheck:
    """Findings of records, and with their tokenizer of a store's groups.

    Args:
        tokenizer: the store's, or whose control tokens to look for in records.
        has_tails: whether answers go on after their end token (``--train-on-turn-tail``).
    """

    def __init__(self, tokenizer: Tokenizer | None = None, *, has_tails: bool = False) -> None:
        self._has_tails = has_tails
        names: tuple[str, ...] = _CONTROL_NAMES
        if tokenizer is not None:
            self._tokenizer = tokenizer
            special = [*tokenizer.special_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
            self._is_special_V = np.zeros(max(tokenizer.vocab_size, *special) + 1, dtype=bool)
            self._is_special_V[special] = True
            self._adds_bos = tokenizer.adds_bos
            self.template_end = _template_end(tokenizer)
            names = tuple(name for name in tokenizer.control_names if len(name) > 2) or names
        self._control_names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def record(self, record: GroupRecord) -> GroupFindings:
        """Look at a record's texts."""
        texts = [_assistant_text(response.text) for response in record.responses]
        findings = self._in_responses(texts)
        findings["empty-responses"] += sum(not text.strip() for text in texts)
        findings["duplicate-responses"] += len(texts) - len({_key(repr(r.text)) for r in record.responses})
        is_chat = not all(isinstance(text, str) for text in (record.prompt, *(r.text for r in record.responses)))
        prompt = _all_text(record.prompt)
        if is_chat:
            findings["control-names-in-prompt"] += bool(self._control_names.search(prompt))
        else:
            findings["template-in-prompt"] += bool(ROLE_MARKERS.search(prompt))
            findings["no-separator"] += sum(_run_together(prompt, text) for text in texts)
        return GroupFindings(prompt_key=_key(repr(record.prompt)), findings=+findings, end_tokens=Counter())

    def sample(self, sample: GroupSample) -> GroupFindings:
        """Look at a store's group."""
        prompt = self._tokenizer.decode(sample.prompt_tokens.tolist())
        trained = [
            tokens if mask is None else tokens[mask]
            for tokens, mask in zip(sample.response_tokens, sample.response_masks)
        ]
        texts = [self._tokenizer.decode(tokens[~self._is_special(tokens)].tolist()) for tokens in trained]
        findings = self._in_responses(texts) + self._in_prompt_tokens(sample.prompt_tokens)
        keys = {_key(tokens.tobytes()) for tokens in sample.response_tokens}
        findings["duplicate-responses"] += len(texts) - len(keys)
        findings["empty-responses"] += sum(not text.strip() for text in texts)
        for tokens, mask in zip(sample.response_tokens, sample.response_masks):
            tokens, mask = self._without_tails(tokens, mask)
            special = self._is_special(tokens)
            findings["missing-end"] += not special[-1]
            findings["control-tokens-inside"] += bool((special & ~_run_ends(mask, len(tokens)) & _mask(mask)).any())
        is_templated = self.template_end is not None and prompt.rstrip().endswith(self.template_end)
        if self.template_end is not None:
            findings["template-not-applied"] += not is_templated
        if not is_templated:
            findings["template-in-prompt"] += bool(ROLE_MARKERS.search(self._plain_text(sample.prompt_tokens)))
            findings["no-separator"] += self._num_run_together(sample)
        return GroupFindings(
            prompt_key=_key(sample.prompt_tokens.tobytes()),
            findings=+findings,
            end_tokens=Counter(int(tokens[-1]) for tokens in sample.response_tokens),
        )

    def _without_tails(self, tokens: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """A response without the blank tokens that follow the end token of each of its turns."""
        if not self._has_tails:
            return tokens, mask
        special, kept = self._is_special(tokens), np.ones(len(tokens), dtype=bool)
        for end in np.flatnonzero(_run_ends(mask, len(tokens))).tolist():
            start = end
            while start > 0 and not special[start]:
                start -= 1
            if special[start] and not self._tokenizer.decode(tokens[start + 1 : end + 1].tolist()).strip():
                kept[start + 1 : end + 1] = False
        return tokens[kept], None if mask is None else mask[kept]

    def _in_responses(self, texts: Iterable[str]) -> Counter[str]:
        findings: Counter[str] = Counter()
        for text in texts:
            if ROLE_MARKERS.search(text):
                findings["role-markers"] += 1
            elif self._control_names.search(text):
                findings["control-names"] += 1
        return findings

    def _in_prompt_tokens(self, tokens: np.ndarray) -> Counter[str]:
        bos = self._tokenizer.bos_id
        if bos is None:
            return Counter()
        begins = tokens == bos
        # where one token begins and ends, it may stand between turns too
        doubled = begins[:2].sum() > 1 if bos == self._tokenizer.eos_id else begins.sum() > 1
        return Counter({"double-bos": int(doubled), "missing-bos": int(self._adds_bos and not begins[0])})

    def _is_special(self, tokens: np.ndarray) -> np.ndarray:
        return self._is_special_V[tokens]

    def _plain_text(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens[~self._is_special(tokens)].tolist())

    def _num_run_together(self, sample: GroupSample) -> int:
        """Responses that start, in the decoded row, right after the prompt's last character."""
        tail = sample.prompt_tokens[-_JOIN_TOKENS:].tolist()
        before = self._tokenizer.decode(tail)
        rows = [self._tokenizer.decode(tail + t[:_JOIN_TOKENS].tolist()) for t in sample.response_tokens]
        return sum(row.startswith(before) and _run_together(before, row[len(before) :]) for row in rows)


def _template_end(tokenizer: Tokenizer) -> str | None:
    """What the chat template writes after the last user turn, as the tokenizer decodes it; None where it has none."""
    try:
        text = tokenizer.render_chat([Message(role="user", content=_SENTINEL)], add_generation_prompt=True)
    except DataError:
        return None
    _, found, end = text.rpartition(_SENTINEL)
    return tokenizer.decode(tokenizer.encode_rendered(end)).strip() or None if found else None


def _mask(mask: np.ndarray | None) -> np.ndarray | bool:
    return True if mask is None else mask


def _run_ends(mask: np.ndarray | None, length: int) -> np.ndarray:
    """[length] bool: the last token of each trained run, where an end token belongs."""
    ends = np.zeros(length, dtype=bool)
    ends[-1] = True
    if mask is not None:
        ends[:-1] = mask[:-1] & ~mask[1:]
    return ends


def _run_together(prompt: str, response: str) -> bool:
    return bool(prompt and response.strip()) and not (prompt[-1].isspace() or response[0].isspace())


def _assistant_text(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(message.content for message in text if message.role == "assistant")


def _all_text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message.content for message in text)


def _key(content: str | bytes) -> int:
    data = content if isinstance(content, bytes) else content.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
