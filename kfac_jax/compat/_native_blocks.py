"""Which native blocks stand for the blocks that existing programs choose by tag."""

import dataclasses
import functools
import itertools
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

from kfac_jax import blocks
from kfac_jax._utils import arguments
from kfac_jax.compat import curvature_blocks as classes
from kfac_jax.plan import Layer

DEFAULTS: dict[str, type[classes.CurvatureBlock]] = {
    "dense": classes.DenseTwoKroneckerFactored,
    "repeated_dense": classes.RepeatedDenseKroneckerFactored,
    "conv2d": classes.Conv2DTwoKroneckerFactored,
    "scale_and_shift": classes.ScaleAndShiftDiagonal,
    "generic": classes.NaiveDiagonal,
}
"""The block of each tag, there and here."""

KINDS = {
    "dense": ("dense",),
    "repeated_dense": ("dense",),
    "conv2d": ("conv",),
    "scale_and_shift": ("scale", "shift", "scale_and_shift"),
    "generic": ("generic", "unmatched"),
}
"""The kinds of layers that each tag stands for."""

_registered: dict[str, Any] = {}
"""What programs have set: for the whole process, as `set_default_tag_to_block_ctor` has
it. Only `native_blocks` reads it."""


def set_default_tag_to_block_ctor(tag_name: str, block_ctor: Any) -> None:
    """Sets the block of a tag for all optimizers made from now on in this process.

    Args:
      tag_name: the tag, or the `variant` of a tag.
      block_ctor: a class of `curvature_blocks`, one derived from it, or a native block.
    """
    _registered[_plain(tag_name)] = block_ctor


def get_default_tag_to_block_ctor(tag_name: str) -> Any:
    """What is set for a tag, or its default; None for an unknown tag."""
    name = _plain(tag_name)
    return _registered.get(name, DEFAULTS.get(name))


def _plain(tag_name: str) -> str:
    arguments.instance("tag_name", tag_name, str, "the name of a tag")
    return tag_name.removesuffix("_tag")


@dataclasses.dataclass(frozen=True)
class NativeBlocks:
    """A rule for `make_curvature(blocks=...)`: blocks of some kinds of layers.

    Other kinds keep their default. As there, Kronecker blocks of layers with one input
    or output are damped exactly.

    Attributes:
      kinds: blocks by the kind of layer.
    """

    kinds: tuple[tuple[str, blocks.Block], ...]

    def __call__(self, layer: Layer) -> blocks.Block | None:
        """The block of a layer."""
        block = dict(self.kinds).get(layer.kind, layer.block)
        exact = type(block) is blocks.Kronecker
        return dataclasses.replace(block, exact_scalars=True) if exact else block


def native_blocks(
    layer_tag_to_block_ctor: Mapping[str, Any] | None = None,
) -> NativeBlocks:
    """Translates blocks by tag, those that are set by default included.

    Args:
      layer_tag_to_block_ctor: classes of `curvature_blocks`, classes derived from them,
        or native blocks, by tag; None leaves a tag at its default.

    Returns:
      What `make_curvature(blocks=...)` takes.

    Raises:
      TypeError: if something is no such class.
      ValueError: if a class has no native block, if its options or its tag have no
        counterpart, or if tags that are one kind of layer here have different blocks.
    """
    if layer_tag_to_block_ctor is not None:
        arguments.instance(
            "layer_tag_to_block_ctor",
            layer_tag_to_block_ctor,
            Mapping,
            "blocks by tag, or None",
        )
    given = {_plain(tag): x for tag, x in (layer_tag_to_block_ctor or {}).items()}
    given = {tag: x for tag, x in (_registered | given).items() if x is not None}
    if "repeated_dense" in given:  # which are layers like others here
        given = {"dense": DEFAULTS["dense"]} | given
    replaced: list[str] = []
    natives = {tag: _native(tag, ctor, replaced) for tag, ctor in given.items()}
    chosen: dict[str, tuple[str, blocks.Block]] = {}
    for tag, native in natives.items():
        _check_tag(tag, native)
        for kind in KINDS.get(tag, ()):
            other, block = chosen.setdefault(kind, (tag, native))
            if block != native:
                raise ValueError(
                    f"Layers tagged {other!r} and {tag!r} are of one kind, {kind!r}, "
                    f"here; expected one block for them, got {block!r} and {native!r}. "
                    "Choose blocks by path: make_curvature(..., blocks={path: block})."
                )
    if replaced:
        _warn_of_replaced(replaced)
    defaults = {k: DEFAULTS[tag].native for tag, kinds in KINDS.items() for k in kinds}
    kinds = [(k, b) for k, (_, b) in chosen.items() if b != defaults[k]]
    return NativeBlocks(tuple(kinds))


def _check_tag(tag: str, native: blocks.Block) -> None:
    """Tags of a program's own can have the default of dense layers, as those have."""
    if tag not in KINDS and native != classes.KroneckerFactored.native:
        raise ValueError(
            f"The tag {tag!r} stands for no kind of layer, so its block {native!r} "
            f"cannot be chosen by it; expected one of {', '.join(KINDS)}. Choose "
            "blocks by path: make_curvature(..., blocks={path: block})."
        )


def _warn_of_replaced(replaced: list[str]) -> None:
    warnings.warn(
        f"kfac_jax runs native blocks in place of custom ones: {'; '.join(replaced)}. "
        "A native block handles weight sharing and its scale by itself. To choose it, "
        "and silence this, pass it as it is: layer_tag_to_block_ctor="
        '{"repeated_dense": kfac_jax.blocks.Kronecker()}, or blocks= of '
        "make_curvature.",
        stacklevel=callers_level() + 1,
    )


def callers_level() -> int:
    """How far up the stack the program is that calls this library."""
    frames = (frame for frame, _ in traceback.walk_stack(None))
    names = (str(frame.f_globals.get("__name__", "")) for frame in frames)
    own = itertools.takewhile(lambda name: name.split(".")[0] == "kfac_jax", names)
    return len(list(own))


def _native(tag: str, ctor: Any, replaced: list[str]) -> blocks.Block:
    """The native block; notes in `replaced` what of a custom one is not run."""
    if isinstance(ctor, blocks.Block):
        return ctor
    options: dict[str, Any] = {}
    while isinstance(ctor, functools.partial):
        options = dict(ctor.keywords) | options
        ctor = ctor.func
    if not (isinstance(ctor, type) and issubclass(ctor, classes.CurvatureBlock)):
        raise TypeError(
            "Blocks for a tag are expected as a class of kfac_jax.curvature_blocks, "
            "one derived from it, or a block of kfac_jax.blocks; got "
            f"{arguments.shown(ctor)} for {tag!r}."
        )
    if ctor.native is None:
        raise ValueError(
            f"{ctor.__name__} (for {tag!r}) derives from no block that has a native "
            "counterpart; expected a class derived from KroneckerFactored, Diagonal, "
            "Full or ScaledIdentity. Write a kfac_jax.blocks.Block and pass that."
        )
    if options.pop("scale", 1.0) != 1.0:
        raise ValueError(
            f"ScaledIdentity (for {tag!r}) is expected with scale 1; got another. "
            "Identity() has no scale: change the learning rate of those parameters."
        )
    missing = sorted({*_overridden(ctor), *options})
    if missing:
        replaced.append(
            f"{ctor.native!r} for {ctor.__name__} (tag {tag!r}), without its "
            f"{', '.join(missing)}"
        )
    return ctor.native


def _overridden(ctor: type) -> list[str]:
    """What classes outside of `curvature_blocks` define."""
    library = (classes.__name__, "builtins", "abc", "typing")
    return [
        name
        for cls in ctor.__mro__
        if cls.__module__ not in library
        for name in cls.__dict__
        if name == "__init__" or not name.startswith(("__", "_abc"))
    ]
