"""The kinds of layers, one file each: how they are recognised, how rows are read."""

from kfac_jax._jaxpr.kinds import elementwise, tagged
from kfac_jax._jaxpr.kinds.convolution import convolution
from kfac_jax._jaxpr.kinds.dense import dot_general
from kfac_jax._jaxpr.kinds.elementwise import started as started
from kfac_jax._jaxpr.kinds.embedding import embedding
from kfac_jax._jaxpr.kinds.outcome import Rule
from kfac_jax._jaxpr.kinds.ragged import ragged_dot

ENTRIES = ("div", "max", "min", "pow", "atan2", "rem", "select_n", "clamp")
"""Primitives that a parameter meets data in, entry by entry."""

JOINS = {"concatenate": elementwise.concatenated, "stack": elementwise.stacked}
"""Primitives that join a parameter to data."""

BY_OPERAND = {*ENTRIES, *JOINS}
"""Primitives each of whose operands may be a parameter by itself."""

RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "gather": embedding,
    "ragged_dot_general": ragged_dot,
    **JOINS,
    "mul": elementwise.scale,
    "add": elementwise.shift,
    "sub": elementwise.shift,
    "kfac_layer": tagged.tagged,
    "kfac_generic": tagged.generic,
    **dict.fromkeys(ENTRIES, elementwise.entry),
}
"""One rule for each primitive that can combine a parameter with data."""
