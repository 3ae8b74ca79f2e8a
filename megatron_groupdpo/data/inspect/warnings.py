"""What usually spoils a preference run: each rule with its threshold and what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import Counts
from megatron_groupdpo.data.inspect.stats import Statistics

Unit = Literal["groups", "responses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A share of groups or responses that is too large."""

    unit: Unit
    above: float
    """The warning appears where the share is larger than this."""
    what: str
    advice: str


RULES: dict[str, Rule] = {
    "duplicate-prompts": Rule(
        unit="groups", above=0.01, what="repeat the prompt of another group",
        advice="merge them into one group or drop them: repeated prompts count several times, and random pairs of "
        "responses to one prompt stay uncontrasted",
    ),
    "duplicate-responses": Rule(
        unit="responses", above=0.01, what="repeat another response of their group",
        advice="keep one of each: equal texts on both sides cancel, on one side they count twice",
    ),
    "one-sided": Rule(
        unit="groups", above=0.0, what="lack a positive or a negative, so they have no preference term",
        advice="choose --one-sided drop when preprocessing, another --partition, or sample more responses per prompt",
    ),
    "dropped-one-sided": Rule(
        unit="groups", above=0.1, what="were dropped because a side was missing",
        advice="choose another --partition, sample more responses per prompt, or keep them for their NLL with "
        "--one-sided keep",
    ),
    "ties": Rule(
        unit="responses", above=0.1, what="were dropped because they tie with a response on the other side of a "
        "boundary",
        advice="take some of them with --tie-break random, length or first (topk), choose --partition best-worst, or "
        "use a finer scorer",
    ),
    "equal-values": Rule(
        unit="groups", above=0.01, what="give all their responses the same value, so nothing ranks them",
        advice="use a finer scorer, or drop them with --partition mean, which leaves ties out",
    ),
    "contradicting-labels": Rule(
        unit="groups", above=0.0, what="have a negative with a higher value than one of their positives",
        advice="check the sign of the scores (a rank counts from 1 as the best) and where the labels come from",
    ),
    "not-a-prefix": Rule(
        unit="responses", above=0.0, what="were dropped: the chat template renders their prompt differently once an "
        "answer follows",
        advice="use a --chat-template that leaves earlier turns as they are (thinking and tool sections often are not)",
    ),
    "retokenized": Rule(
        unit="responses", above=0.01, what="were tokenized in pieces, because prompt and response would merge at "
        "their border",
        advice="use a chat template that ends the prompt with a control token or a line break",
    ),
    "prompts-cut": Rule(
        unit="groups", above=0.01, what="had their prompt cut from the left, the system turn first",
        advice="raise --seq-length, or drop what does not fit with --length-policy drop",
    ),
    "prompts-too-long": Rule(
        unit="groups", above=0.01, what="were dropped because the prompt leaves no room for a response",
        advice="raise --seq-length",
    ),
    "responses-cut": Rule(
        unit="responses", above=0.01, what="were cut at the end, end token included",
        advice="raise --seq-length, or choose --length-policy drop: cut positives teach the model not to stop",
    ),
    "responses-too-long": Rule(
        unit="responses", above=0.01, what="were dropped because they are longer than --seq-length allows",
        advice="raise --seq-length: dropping the long ones shifts the lengths of what is left",
    ),
    "empty-responses": Rule(
        unit="responses", above=0.0, what="are empty or blank",
        advice="drop them: an empty negative teaches to be long, an empty positive to stop at once (preprocessing "
        "drops and counts blank ones)",
    ),
    "bad-records": Rule(
        unit="groups", above=0.0, what="break the rules of their schema",
        advice="repair them, or drop and count them with --on-bad-record drop",
    ),
    "unread-fields": Rule(
        unit="groups", above=0.0, what="(at least) have text in a field that their schema does not know, so it is not "
        "read",
        advice="rename the field to one that docs/data.md lists, write its text into the prompt, or remove it",
    ),
    "text-lost": Rule(
        unit="groups", above=0.0, what="were dropped because the chat template or the tokenizer loses some of their "
        "text",
        advice="use a --chat-template that shows it (or --response-text verbatim), or a tokenizer with byte tokens",
    ),
    "same-tokens": Rule(
        unit="responses", above=0.01, what="were dropped because they have the tokens of another response of their "
        "group, once rendered, encoded and cut",
        advice="raise --seq-length where they were cut; else they differ in white space only",
    ),
    "normalized": Rule(
        unit="responses", above=0.01, what="are trained with other characters than they have: the tokenizer replaces "
        "them",
        advice="normalize the texts yourself if it matters how they are spelled",
    ),
    "missing-end": Rule(
        unit="responses", above=0.01, what="do not end with an end token",
        advice="raise --seq-length where they were cut; else the model does not learn to stop",
    ),
    "double-bos": Rule(
        unit="groups", above=0.0, what="begin the prompt with the beginning token twice",
        advice="remove it from the texts: the template or --add-bos writes it already",
    ),
    "missing-bos": Rule(
        unit="groups", above=0.0, what="do not begin with the beginning token that the tokenizer itself adds",
        advice="use --add-bos auto, or a chat template that writes bos_token",
    ),
    "control-tokens-inside": Rule(
        unit="responses", above=0.0, what="train on a control token before their end (a turn marker read from the "
        "text, or an end token twice)",
        advice="remove the markers from the responses' texts; the chat template adds them",
    ),
    "role-markers": Rule(
        unit="responses", above=0.001, what="spell turn markers of a chat template, or go on as the next speaker",
        advice="cut responses where the next turn starts; give conversations as messages, not as rendered text",
    ),
    "control-names": Rule(
        unit="responses", above=0.001, what="spell the name of a control token (such as </s>) in their text",
        advice="strip it; the end token is added by preprocessing",
    ),
    "control-names-in-prompt": Rule(
        unit="groups", above=0.0, what="spell the name of a control token in a message of their prompt",
        advice="preprocessing keeps it as text; strip it where it is a rest of a chat template, or say that the record "
        "is rendered already",
    ),
    "escaped": Rule(
        unit="groups", above=0.0, what="spell control tokens in their texts, which stay text",
        advice="look at some: people type them to pose as the system, and they are rests of another template",
    ),
    "template-in-prompt": Rule(
        unit="groups", above=0.001, what="have a chat template's turn markers written in the text of their prompt, "
        "where they are text and no control tokens",
        advice="give the prompt as messages and let --chat-template render it",
    ),
    "template-not-applied": Rule(
        unit="groups", above=0.01, what="are plain text, though the tokenizer has a chat template",
        advice="for a chat model, preprocess with --apply-chat-template; for a base model, ignore this",
    ),
    "mixed-forms": Rule(
        unit="groups", above=0.0, what="are plain text, and the others are rendered by the chat template (or the other "
        "way round)",
        advice="give all records as messages, or preprocess with --apply-chat-template",
    ),
    "spanned": Rule(
        unit="responses", above=0.01, what="begin where a token would span the end of their prompt, so their first "
        "tokens are not those of the text read as a whole",
        advice="end the prompts with a line break, and begin the responses with a word",
    ),
    "no-separator": Rule(
        unit="responses", above=0.5, what="follow their prompt without white space between",
        advice="end the prompts with a line break, or use --apply-chat-template",
    ),
}  # fmt: skip

LENGTH_RATIO, LENGTH_CORRELATION = 1.2, 0.2
"""Length bias: beyond this ratio of mean lengths (either way), or this mean correlation within groups."""

_OF_COUNTS = {
    "dropped-one-sided": (why.ONE_SIDED, why.TIED_OUT, why.BECAME_ONE_SIDED),
    "ties": (why.TIED,),
    "not-a-prefix": (why.NO_PREFIX,),
    "retokenized": (why.RETOKENIZED,),
    "prompts-cut": (why.PROMPT_CUT,),
    "prompts-too-long": (why.PROMPT_TOO_LONG,),
    "responses-cut": (why.RESPONSE_CUT,),
    "responses-too-long": (why.TOO_LONG,),
    "empty-responses": (why.EMPTY_RESPONSE,),
    "bad-records": (why.BAD_RECORD,),
    "text-lost": (why.LOST_BY_TEMPLATE, why.LOST_BY_TOKENIZER),
    "same-tokens": (why.SAME_TOKENS, why.SAME_TOKENS_AS_OTHER_SIDE),
    "normalized": (why.RESPONSE_NORMALIZED,),
    "escaped": (why.ESCAPED,),
    "spanned": (why.SPANNED,),
}
"""Findings that preprocessing counted, out of what it read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One warning."""

    code: str
    text: str
    """Number, share and threshold."""
    advice: str
    number: float
    share: float | None = None
    examples: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "code": self.code,
            "number": self.number,
            "share": self.share,
            "text": self.text,
            "advice": self.advice,
            "examples": list(self.examples),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Findings of one pass, and out of how many."""

    hits: Counter[str]
    num_groups: int
    num_responses: int
    examples: dict[str, list[str]]
    place: str = ""
    """Where the numbers are from, for the text: "" or such as " of a sample"."""


def warnings_of(stats: Statistics, seen: Seen, preprocessing: Counts | None) -> list[Finding]:
    """The rules whose threshold is passed, in the order of :data:`RULES`, length bias first.

    Args:
        stats: of all groups.
        seen: what was found in the texts (of all groups or a sample).
        preprocessing: the counts in the store's meta; None for records.
    """
    codes = {"one-sided", "equal-values", "contradicting-labels"}
    if stats.distributions["group_size"].max <= 1:
        codes.remove("one-sided")  # single answers, for supervised fine-tuning
    passes = [
        Seen(
            hits=Counter({code: stats.num[code] for code in codes}),
            num_groups=stats.num["groups"],
            num_responses=stats.num["responses"],
            examples=stats.examples,
        ),
        seen,
    ]
    if preprocessing is not None:
        unread = why.unread_fields(preprocessing)
        counted = {code: sum(preprocessing[reason] for reason in reasons) for code, reasons in _OF_COUNTS.items()}
        counted["mixed-forms"] = min(preprocessing[why.AS_CHAT], preprocessing[why.AS_TEXT])
        counted["unread-fields"] = max(unread.values(), default=0)
        passes.append(
            Seen(
                hits=Counter(counted),
                num_groups=preprocessing[why.GROUPS_READ],
                num_responses=preprocessing[why.RESPONSES_READ],
                examples={"unread-fields": [f"{name} ({count:,})" for name, count in unread.items()]},
                place=" read when preprocessing",
            )
        )
    found = [(code, rule, each) for code, rule in RULES.items() for each in passes]
    return [*_length_bias(stats), *(f for code, rule, each in found if (f := _judge(code, rule, each)))]


def _judge(code: str, rule: Rule, seen: Seen) -> Finding | None:
    total = seen.num_groups if rule.unit == "groups" else seen.num_responses
    number = seen.hits[code]
    share = number / total if total else 0.0
    if share <= rule.above:
        return None
    bound = f"more than {_percent(rule.above)}" if rule.above else "any"
    return Finding(
        code=code,
        text=f"{number:,} of {total:,} {rule.unit}{seen.place} ({_percent(share)}; warns at {bound}) {rule.what}",
        advice=rule.advice,
        number=number,
        share=share,
        examples=tuple(seen.examples.get(code, ())),
    )


def _length_bias(stats: Statistics) -> list[Finding]:
    correlation = stats.distributions["length_correlation"]
    ratio, mean = stats.length_ratio, correlation.mean
    is_ratio_off = stats.num_compared > 0 and not 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO
    is_correlated = correlation.num > 0 and abs(mean) > LENGTH_CORRELATION
    if not (is_ratio_off or is_correlated):
        return []
    parts = []
    if stats.num_compared:
        share = stats.num_positives_longer / stats.num_compared
        parts.append(
            f"positives have {ratio:.2f} times the length of the negatives of their group and are longer in "
            f"{_percent(share)} of {stats.num_compared:,} groups (warns beyond {LENGTH_RATIO:g} times either way)"
        )
    if correlation.num:
        parts.append(
            f"the mean correlation of length and value within {correlation.num:,} groups is {mean:+.2f} "
            f"(warns beyond {LENGTH_CORRELATION:g} either way)"
        )
    return [
        Finding(
            code="length-bias",
            text="; ".join(parts),
            advice="train with --score-average (scores per token), compare lengths in the evaluation, or rebalance "
            "the groups by length",
            number=ratio if is_ratio_off else mean,
        )
    ]


def _percent(share: float) -> str:
    """Three significant digits, 100 only where it is all."""
    return f"{min(100 * share, 99.9) if share < 1 else 100:.3g} %"
