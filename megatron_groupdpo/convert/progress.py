"""Progress of a conversion in bytes, with the time that is left; silent when it is over within seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def byte_bar(what: str, total: int, *, quiet: bool = False) -> Iterator[Any]:
    """A bar over ``total`` bytes; call its ``update`` with what was done."""
    with tqdm(
        total=total, desc=what, unit="B", unit_scale=True, delay=2.0, mininterval=1.0, leave=False, disable=quiet
    ) as bar:
        yield bar
