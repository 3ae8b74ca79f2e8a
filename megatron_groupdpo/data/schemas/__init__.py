"""The record forms the data may have, one file each, registered here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_groupdpo.data.schemas import (
    canonical,
    distilabel,
    helpsteer3,
    mix_instruct,
    ms_swift,
    nectar,
    nemo_rl,
    on_policy,
    pairs,
    reward,
    sft,
    turns,
    ultrafeedback,
    verified,
)
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import FieldCheck, KnownFields
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import GroupRecord

__all__ = ["SCHEMAS", "Schema", "SchemaOptions", "choose_schema", "schema_named"]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One record form."""

    name: str
    matches: Callable[[Record], bool]
    """Whether the record has this form; looks at keys and container types only."""
    read: Callable[[Record, str, SchemaOptions], GroupRecord]
    """``read(record, where, options)``: the group of the form's own fields; raises DataError naming ``where``."""
    known: KnownFields
    """What becomes of its records' fields."""
    single_answers: bool = False
    """Groups of one positive response, for the ``sft`` objective: used only where named."""
    named_scores: bool = False
    """Whether responses may have several scores, which ``--score-weights`` weighs."""
    yields: bool = False
    """Gives way when another schema fits too: group data often repeats its best and worst as a pair."""

    def check(self, options: SchemaOptions, source: str) -> None:
        """Raises ConfigError on an option that nothing in records of this form answers to."""
        if options.score_weights is not None and not self.named_scores:
            having = ", ".join(schema.name for schema in SCHEMAS if schema.named_scores)
            raise ConfigError(
                f"--score-weights weighs named scores, and {source} has the schema {self.name!r}, which has one value "
                f"a response; leave it out (schemas with named scores: {having})"
            )

    @cached_property
    def _field_check(self) -> FieldCheck:
        return FieldCheck(self.known)

    def parse(self, record: Record, where: str, options: SchemaOptions) -> GroupRecord:
        """The record's group, with the fields that every form may have; raises DataError naming ``where``."""
        unread = self._field_check.unread(record, where)
        group = turns.with_what_stands_beside(self.read(record, where, options), record, options)
        turns.check_weights(group)
        unread += turns.unread_in_turns(group)
        return replace(group, unread=unread) if unread else group


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        name="canonical", matches=canonical.matches, read=canonical.parse, known=canonical.FIELDS, named_scores=True
    ),
    Schema(name="pairs", matches=pairs.matches, read=pairs.parse, known=pairs.FIELDS, yields=True),
    Schema(name="ultrafeedback", matches=ultrafeedback.matches, read=ultrafeedback.parse, known=ultrafeedback.FIELDS),
    Schema(name="on_policy", matches=on_policy.matches, read=on_policy.parse, known=on_policy.FIELDS),
    Schema(name="reward", matches=reward.matches, read=reward.parse, known=reward.FIELDS),
    Schema(name="nectar", matches=nectar.matches, read=nectar.parse, known=nectar.FIELDS),
    Schema(
        name="mix_instruct",
        matches=mix_instruct.matches,
        read=mix_instruct.parse,
        known=mix_instruct.FIELDS,
        named_scores=True,
    ),
    Schema(name="distilabel", matches=distilabel.matches, read=distilabel.parse, known=distilabel.FIELDS),
    Schema(name="nemo_rl", matches=nemo_rl.matches, read=nemo_rl.parse, known=nemo_rl.FIELDS),
    Schema(name="helpsteer3", matches=helpsteer3.matches, read=helpsteer3.parse, known=helpsteer3.FIELDS),
    Schema(name="ms_swift", matches=ms_swift.matches, read=ms_swift.parse, known=ms_swift.FIELDS),
    Schema(name="verified", matches=verified.matches, read=verified.parse, known=verified.FIELDS),
    Schema(name="sft", matches=sft.matches, read=sft.parse, known=sft.FIELDS, single_answers=True),
)


def schema_named(name: str) -> Schema:
    """The schema registered under ``name``; DataError with the nearest name otherwise."""
    for schema in SCHEMAS:
        if schema.name == name:
            return schema
    names = [schema.name for schema in SCHEMAS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(f"unknown --schema {name!r}; {hint}Known: auto, {', '.join(names)}")


def choose_schema(name: str, first_records: Sequence[tuple[Record, str]]) -> Schema:
    """The schema ``name``, or for ``"auto"`` the only one that more than half of the first records have.

    A record among them that has no form at all is left to that schema's reader, which names what the record lacks.

    Raises:
        DataError: no schema fits, several do, or the first records have different forms.
    """
    if name != "auto":
        return schema_named(name)
    known = [schema for schema in SCHEMAS if not schema.single_answers]
    records = [record for record, _ in first_records]
    formed = [record for record in records if any(schema.matches(record) for schema in known)]
    if 2 * len(formed) <= len(records):
        formed = records
    fitting = [schema for schema in known if all(schema.matches(record) for record in formed)]
    if len(fitting) > 1:
        fitting = [schema for schema in fitting if not schema.yields]
    if len(fitting) == 1:
        return fitting[0]
    where = first_records[0][1]
    if fitting:
        names = ", ".join(schema.name for schema in fitting)
        raise DataError(f"{where}: the records fit several schemas ({names}); name one with --schema")
    kinds = [[schema.name for schema in known if schema.matches(record)] for record in records]
    having = [i for i, names in enumerate(kinds) if names]
    if formed is not records or len(having) == len(records):
        first = having[0]
        odd = next((i for i in having if kinds[first][0] not in kinds[i]), first)
        raise DataError(
            f"{first_records[odd][1]}: this record has the form {kinds[odd][0]!r} while {first_records[first][1]} has "
            f"{kinds[first][0]!r}; give files of one form, or preprocess them separately"
        )
    odd = next(i for i, names in enumerate(kinds) if not names)
    hint = " (single answers need --schema sft)" if sft.matches(records[odd]) else ""
    raise DataError(
        f"{first_records[odd][1]}: no known schema fits a record with the keys "
        f"{', '.join(map(str, records[odd]))}{hint}; name one with --schema: "
        f"{', '.join(schema.name for schema in SCHEMAS)}"
    )
