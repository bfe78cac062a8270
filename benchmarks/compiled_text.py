"""Counts in the text of a program that XLA compiled; knows nothing of JAX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable


def instructions(text: str) -> int:
    """How many the program has, those in fusions too."""
    return sum(" = " in line for line in text.splitlines())


def _square(factor: float) -> Callable[..., float]:
    return lambda x, *_: factor * math.prod(x) * x[-1]


def _rectangular(factor: float) -> Callable[..., float]:
    return lambda x, *_: factor * math.prod(x) * min(x[-2:])


LIBRARY: dict[str, Callable[..., float]] = {
    "potrf": _square(1 / 3),
    "trsm": lambda x, y, *_: math.prod(y) * x[-1],
    "getrf": _rectangular(2 / 3),
    "geqrf": _rectangular(4 / 3),
    "orgqr": _rectangular(4 / 3),
    "syevd": _square(9.0),
    "gesdd": _rectangular(22.0),
}
"""About how many FLOPs LAPACK needs, by routine, from its operands' shapes."""

_CALL = re.compile(r'custom_call_target="(?:lapack|blas)_[sdcz](\w+?)(?:_ffi)?"')
_SHAPES = re.compile(r"operand_layout_constraints=\{(.*?)\}, \w+=")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def library_calls(text: str, in_every_step: bool = False) -> list[float]:
    """The FLOPs of each call of LAPACK, of which XLA counts none.

    Args:
        text: the compiled program, as XLA writes it.
        in_every_step: whether to leave out what is below a conditional.

    Returns:
        A number for each call in the text; a loop's body is counted once.

    Raises:
        ValueError: if a routine or its form is unknown.
    """
    skipped = _conditional_computations(text) if in_every_step else set()
    found: list[float] = []
    for name, lines in _computations(text).items():
        if name in skipped:
            continue
        for line in lines:
            call = _CALL.search(line)
            if call is None:
                continue
            operands = _SHAPES.search(line)
            if call[1] not in LIBRARY or operands is None:
                raise ValueError(
                    f"Expected a call of {', '.join(LIBRARY)}, got {line.strip()!r}: "
                    "add what it costs to LIBRARY, or read its operands' shapes."
                )
            shapes = [
                tuple(map(int, x.split(","))) if x else ()
                for x in _SHAPE.findall(operands[1])
            ]
            found.append(LIBRARY[call[1]](*shapes))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """A program's functions, by name."""
    result: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?(%[^\s(]+) \(.*\{$", line)
        if head:
            body = result[head[1]] = []
        else:
            body.append(line)
    return result


def _conditional_computations(text: str) -> set[str]:
    """The names of functions that only a conditional leads to."""
    bodies = _computations(text)
    reached: set[str] = set()
    entry = re.search(r"^ENTRY (%[^\s(]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError(f"Expected a program with an ENTRY, got {text[:80]!r}.")
    waiting = [entry[1]]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for line in bodies[name]:
            if not re.search(r"\bconditional\(", line):
                waiting += [x for x in re.findall(r"%[\w.\-]+", line) if x in bodies]
    return set(bodies) - reached
