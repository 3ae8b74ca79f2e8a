"""A Zstandard file as a stream that ends where its last frame does, and nowhere else."""

from __future__ import annotations

import io
from typing import IO

import zstandard

_PIECE_BYTES = 1 << 15


class ZstdStream(io.RawIOBase):
    """The contents of all frames, one after the other.

    ``zstandard``'s own reader takes the end of a file that was cut inside a frame for the end of the contents.

    Raises:
        EOFError: the file ends inside a frame.
        zstandard.ZstdError: it is damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = None
        """The decompressor of the frame that has begun; None between frames."""
        self._compressed, self._read = b"", memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the start of ``buffer``; 0 at the end of the last frame."""
        while not self._read:
            piece = self._compressed or self._file.read(_PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._read, self._compressed = memoryview(self._frame.decompress(piece)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._read))
        buffer[:count], self._read = self._read[:count], self._read[count:]
        return count
