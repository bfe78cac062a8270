"""Reads the character vectors of an R package's lazy-load database (.rdx and .rdb).

The .rdx file is a serialized R list that says where in the .rdb each variable lies. A
variable is four bytes of its unpacked length, then a zlib stream, in which the value is
serialized: big-endian, each object led by a word of flags whose low byte is its type.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from typing import Any

# Types of R objects, as R's manual "R Internals" numbers them.
SYMBOL, PAIRLIST, STRING = 1, 2, 9
LOGICAL, INTEGER, CHARACTER, LIST = 10, 13, 16, 19
REFERENCE, NULL = 255, 254

HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10
ZLIB = 1  # the database's kind of compression that is read here


def read_database(index: bytes, contents: bytes) -> dict[str, Any]:
    """Every variable of a database.

    Args:
        index: the .rdx file.
        contents: the .rdb file.

    Returns:
        Variables by name.

    Raises:
        ValueError: it is written in a way that is not read here.
    """
    entries = unserialize(gzip.decompress(index))
    if entries["compressed"] != [ZLIB]:
        raise ValueError(f"unknown compression {entries['compressed']}")
    variables = {}
    for name, (offset, length) in entries["variables"].items():
        chunk = contents[offset : offset + length]
        value = zlib.decompress(chunk[4:])
        if len(value) != int.from_bytes(chunk[:4], "big"):
            raise ValueError(f"{name} is damaged")
        variables[name] = unserialize(value)
    return variables


def unserialize(raw: bytes) -> Any:
    """One serialized value: a list, a dict where it has names, a str or None."""
    return _Reader(raw).read()


class _Reader:
    """A position in the bytes of one value."""

    def __init__(self, raw: bytes) -> None:
        if raw[:2] != b"X\n":
            raise ValueError("no binary serialization of R")
        self._raw, self._at = raw, 2
        self._symbols: list[Any] = []  # what a reference means
        version, _, _ = self._integers(3)
        if version >= 3:
            self._bytes(self._integer())  # the encoding's name

    def _bytes(self, count: int) -> bytes:
        self._at += count
        if count < 0 or self._at > len(self._raw):
            raise ValueError("cut short")
        return self._raw[self._at - count : self._at]

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self._bytes(4 * count)))

    def _integer(self) -> int:
        return self._integers(1)[0]

    def read(self) -> Any:
        """The value that starts here."""
        flags = self._integer()
        kind = flags & 0xFF
        if kind == NULL:
            return None
        if kind == STRING:
            length = self._integer()
            return None if length < 0 else self._bytes(length).decode()
        if kind == SYMBOL:
            self._symbols.append(self.read())
            return self._symbols[-1]
        if kind == REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == PAIRLIST:
            return self._pairs(flags)
        if kind in (LOGICAL, INTEGER):
            value = self._integers(self._integer())
        elif kind in (CHARACTER, LIST):
            value = [self.read() for _ in range(self._integer())]
        else:
            raise ValueError(f"unknown type {kind}")
        names = (self.read() if flags & HAS_ATTRIBUTES else {}).get("names")
        return dict(zip(names, value, strict=True)) if names else value

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A linked list of tagged values, which is how attributes are written."""
        pairs = {}
        while flags & 0xFF == PAIRLIST:
            tag = self.read() if flags & HAS_TAG else None
            pairs[tag] = self.read()
            flags = self._integer()
        return pairs
