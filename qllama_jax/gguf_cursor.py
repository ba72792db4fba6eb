"""A strict cursor over the header of a GGUF file: bytes -> integers, strings and arrays.

Each count and length is a Python int, which cannot wrap, and is compared with the bytes that are
left before anything is read or allocated. All is little-endian; a string is a length u64 and
UTF-8, an array an item type u32, a length u64 and the items. Source: the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; stricter where a comment says so.
"""

from __future__ import annotations

import struct
from io import BytesIO, FileIO
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGUFValueType

from qllama_jax.errors import GGUFError

MAX_HEADER = 256 * 2**20
MAX_STRING = 64 * 2**20
MAX_ITEMS = 16 * 2**20
READ_STEP = 2**20

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
_DTYPES = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class Cursor:
    """A position in the header, whose bytes are read as they are needed into one owned buffer.

    Every method that reads steps past what it returns and raises `GGUFError` where the bytes are
    missing or not allowed; `where` says for its message what is being read.
    """

    def __init__(self, file: FileIO | BytesIO, path: str, size: int) -> None:
        """Start at the first byte of an open `file` of `size` bytes; `path` is for errors."""
        self.file, self.path, self.size = file, path, size
        self.buffer = bytearray()
        self.pos = 0
        self.where = "header"

    def fail(self, reason: str) -> NoReturn:
        """Raise `GGUFError` with file, place and reason."""
        raise GGUFError(f"{self.path}: {self.where}: {reason}")

    def advance(self, count: int, what: str) -> int:
        """Index in the buffer of the next `count` bytes, which are there and stepped past."""
        start, end = self.pos, self.pos + count
        if end > len(self.buffer):
            self.fill(end, what)
        self.pos = end
        return start

    def fill(self, end: int, what: str) -> None:
        """Have the file's first `end` bytes in the buffer, and up to `READ_STEP` more."""
        if end > self.size:
            self.fail(
                f"{what} ends at byte {end} but the file has {self.size} bytes;"
                " it is truncated or corrupt"
            )
        if end > MAX_HEADER:
            self.fail(f"{what} ends at byte {end}; a header may have {MAX_HEADER} bytes")
        goal = min(max(end, len(self.buffer) + READ_STEP), self.size, MAX_HEADER)
        while len(self.buffer) < goal:
            piece = self.file.read(goal - len(self.buffer))
            if not piece:
                self.fail(f"the file ended at byte {len(self.buffer)} while it was read: it shrank")
            self.buffer += piece

    def integer(self, form: struct.Struct, what: str) -> int:
        """Integer of the given form."""
        return form.unpack_from(self.buffer, self.advance(form.size, what))[0]

    def string(self, what: str, lo: int = 0, hi: int = MAX_STRING) -> str:
        """String of lo..hi bytes of UTF-8."""
        length = self.integer(U64, f"length of {what}")
        if not lo <= length <= hi:
            self.fail(f"{what} has {length} bytes, allowed {lo}..{hi}")
        start = self.advance(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 at byte {start + error.start}")

    def strings(self, count: int) -> list[str]:
        """Next `count` strings. This loop decides how long a vocabulary takes to read."""
        if 8 * count > self.size - self.pos:
            self.fail(f"{count} strings do not fit into the {self.size - self.pos} bytes left")
        items: list[str] = []
        buffer, length_at = self.buffer, U64.unpack_from
        pos, end = self.pos, len(buffer)
        while len(items) < count:
            # What is buffered past `pos` is less than READ_STEP, so no length here is too large.
            text = pos + 8
            stop = text + length_at(buffer, pos)[0] if text <= end else end + 1
            try:
                if stop <= end:
                    items.append(buffer[text:stop].decode())
                    pos = stop
                    continue
            except UnicodeDecodeError:
                pass
            self.pos = pos
            items.append(self.string(f"item {len(items)}"))  # reads on, or refuses
            pos, end = self.pos, len(buffer)
        self.pos = pos
        return items

    def scalars(self, kind: GGUFValueType, count: int) -> np.ndarray:
        """Next `count` numbers or bools, read-only [count]."""
        dtype = np.dtype(_DTYPES[kind])
        start = self.advance(count * dtype.itemsize, f"{kind.name} value")
        values = np.frombuffer(self.buffer[start : self.pos], dtype)
        if kind is GGUFValueType.BOOL:
            if values.size and values.max() > 1:  # stricter than llama.cpp, as the specification
                at = int(np.argmax(values > 1))
                self.fail(f"bool at byte {start + at} is {values[at]}, allowed 0 and 1")
            values = values.view(np.bool_)
        values.setflags(write=False)
        return values

    def kind(self, what: str) -> GGUFValueType:
        """Type of a value or of an array's items."""
        number = self.integer(U32, what)
        if number > 12:
            self.fail(f"{what} is {number}, allowed 0..12")
        return GGUFValueType(number)

    def value(self, kind: GGUFValueType) -> Any:
        """Value of the given type as `Metadata` holds it."""
        if kind is GGUFValueType.STRING:
            return self.string("string")
        if kind is not GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0].item()
        item = self.kind("array item type")
        count = self.integer(U64, "array length")
        if item is GGUFValueType.ARRAY:  # as llama.cpp; unbounded depth in the specification
            self.fail("an array of arrays is not supported")
        if count > MAX_ITEMS:
            self.fail(f"array of {count} items, allowed 0..{MAX_ITEMS}")
        if item is GGUFValueType.STRING:
            return self.strings(count)
        return self.scalars(item, count)
