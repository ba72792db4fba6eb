"""A strict cursor over a GGML, GGMF or GGJT file, whose headers lie between the tensors' data."""

from __future__ import annotations

import struct
from io import FileIO
from typing import NoReturn

from qllama_jax.errors import GGUFError

READ_STEP = 2**16

U32 = struct.Struct("<I")


class GGMLCursor:
    """A position in an open file; bytes are read a step ahead, except those skipped.

    Every method that moves raises `GGUFError` before it reads or allocates where the file has not
    so many bytes; `where` says for its message what is being read.
    """

    def __init__(self, file: FileIO, path: str, size: int) -> None:
        """Start at the first byte of an open `file` of `size` bytes; `path` is for errors."""
        self.file, self.path, self.size = file, path, size
        self.pos = 0
        self.where = "header"
        self._start, self._ahead = 0, b""  # bytes in memory, and where in the file they begin

    def fail(self, reason: str) -> NoReturn:
        """Raise `GGUFError` with file, place and reason."""
        raise GGUFError(f"{self.path}: {self.where}: {reason}")

    def skip(self, count: int, what: str) -> None:
        """Step past `count` bytes, which the file has."""
        end = self.pos + count
        if end > self.size:
            self.fail(
                f"{what} at byte {self.pos} ends at byte {end} but the file has {self.size} bytes;"
                " it is truncated or corrupt"
            )
        self.pos = end

    def take(self, count: int, what: str) -> bytes:
        """Next `count` bytes."""
        at = self.pos
        self.skip(count, what)
        if not self._start <= at <= self.pos <= self._start + len(self._ahead):
            self._start, self._ahead = (
                at,
                self._read(at, min(max(count, READ_STEP), self.size - at)),
            )
        start = at - self._start
        return self._ahead[start : start + count]

    def integer(self, what: str) -> int:
        """Unsigned integer of 32 bits."""
        return U32.unpack(self.take(4, what))[0]

    def _read(self, at: int, count: int) -> bytes:
        self.file.seek(at)
        data = bytearray()
        while len(data) < count:
            piece = self.file.read(count - len(data))
            if not piece:
                self.fail(f"the file ended at byte {at + len(data)} while it was read: it shrank")
            data += piece
        return bytes(data)
