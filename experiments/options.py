"""Options of a command line, as the fields of a dataclass."""

from __future__ import annotations

from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(options: type[T], arguments: list[str] | None = None) -> T:
    """The options that a command line says.

    Args:
        options: a dataclass; the comments at its fields are what `--help` shows.
        arguments: those of this process by default.

    Returns:
        An instance.
    """
    return tyro.cli(options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
