"""The records of a JSON array, one by one: ``[{...}, {...}]`` of any size in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from megatron_groupdpo.errors import DataError

_BLOCK_BYTES = 1 << 20


def records(head: bytes, stream: IO[bytes], source: str) -> Iterator[tuple[Any, int]]:
    """(item, 1-based number) of the array that ``head`` begins and ``stream`` goes on with.

    Raises:
        DataError: broken JSON or UTF-8, naming the item.
    """
    text = _Text(head, stream, source)
    text.expect("[")
    number = 0
    if text.peek() != "]":
        while True:
            number += 1
            yield text.value(number), number
            if text.peek() != ",":
                break
            text.expect(",")
    text.expect("]", number)
    if text.peek():
        text.fail(number, "there is more after the array's end")


class _Text:
    """The undecoded rest of a stream, read as far as the next value needs."""

    def __init__(self, head: bytes, stream: IO[bytes], source: str) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._json = json.JSONDecoder()
        self._stream, self._source = stream, source
        self._ended = False
        self._buffer, self._at = "", 0
        self._add(head)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._more(_BLOCK_BYTES)

    def expect(self, character: str, number: int = 0) -> None:
        """Step over ``character``."""
        if self.peek() != character:
            self.fail(number, f"expected {character!r}")
        self._at += 1

    def value(self, number: int) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # A cut-off value fails at the buffer's end, or at the start of a string that has no end in it.
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if self._ended or not is_cut:
                    self._at = error.pos
                    self.fail(number, error.msg)
            except RecursionError:
                self.fail(number, "nested too deeply")
            except ValueError as error:  # an integer of thousands of digits
                self.fail(number, str(error))
            else:
                # A number may go on in the next block: "1" as "1e+5".
                if end + len("e+5") <= len(self._buffer) or not isinstance(value, int | float) or self._ended:
                    self._at = end
                    return value
            # Twice as much each time: a long value is parsed from its start again, a few times.
            self._more(max(_BLOCK_BYTES, len(self._buffer) - self._at))

    def fail(self, number: int, message: str) -> None:
        """Raise DataError for the item ``number``."""
        excerpt = self._buffer[max(0, self._at - 20) : self._at + 20]
        raise DataError(
            f"{self._source}: broken JSON: {message} at item {number} of the array, near {excerpt!r}; repair the file"
        )

    def _more(self, size: int) -> None:
        self._add(self._stream.read(size))

    def _add(self, block: bytes) -> None:
        self._ended = not block
        try:
            text = self._decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._source}: must be UTF-8, but {error}; convert the file") from None
        self._buffer, self._at = self._buffer[self._at :] + text, 0
