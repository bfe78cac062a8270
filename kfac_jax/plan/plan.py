"""The plan: the user's options, and the layers and groups of the program."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr import custom_rules
from kfac_jax._jaxpr.constants import mixed
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.interpreter import Program
from kfac_jax._jaxpr.parts import Part
from kfac_jax._jaxpr.sites import Site, Use
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.blocks import Full
from kfac_jax.plan import batch, checks
from kfac_jax.plan.choosing import BlocksSpec
from kfac_jax.plan.group import Group, Grouped, Structure, Uses, layers_of
from kfac_jax.plan.grouping import make_layers
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.modes import needs_rng, of_inputs
from kfac_jax.plan.programs import goes_around_rules, tapped_program
from kfac_jax.plan.terms import notes, with_terms
from kfac_jax.plan.tracing import Traced, trace

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `make_curvature`."""

    loss_fn: Callable[..., Any]
    has_aux: bool
    estimation_mode: str
    num_samples: int
    statistics_fraction: float
    l2: float
    tree: TreeSpec = dataclasses.field(repr=False)
    blocks: BlocksSpec = dataclasses.field(repr=False, compare=False)
    on_unmatched: str
    weight_sharing: str
    structure: Structure
    batch_argnums: batch.Argnums = dataclasses.field(default=None, repr=False)
    independent_cases: bool = dataclasses.field(default=False, repr=False)
    factor_dtype: str | None = None
    kept_rules: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)
    agreements: tuple[bool, ...] | None = dataclasses.field(default=None, repr=False)

    def derive(self, params: Params, args: Any, *, quiet: bool) -> "Derived":
        """Traces the loss function and finds layers and groups.

        A plan and every later computation with it derive layers here, so they agree.

        Args:
          params: the parameters, or their shapes.
          args: the loss function's further arguments, or their shapes.
          quiet: whether to leave out warnings, which the plan gave before.

        Returns:
          The program, its layers and its groups.

        Raises:
          TypeError: if the loss is not a real scalar.
          ValueError: as `make_curvature`.
        """
        traced = trace(
            self.loss_fn,
            self.has_aux,
            self.tree,
            params,
            args,
            self.batch_argnums,
            of_inputs(self.estimation_mode),
            self.agreements,
        )
        found = traced.found
        rules = self.kept_rules
        if rules is None:
            rules = custom_rules.kept(found.graph, found.uses, len(self.tree.paths))
        layers, sites = self._layers(found.graph, found.uses, found.parts, rules)
        if any(x.boxes and isinstance(x.block, Full) for x in layers):
            # whose entries belong to the parameter, whatever it is cut in
            layers, sites = self._layers(found.graph, found.whole_uses, (), rules)
        layers, sites = with_terms(layers, sites, found.graph)
        inputs = of_inputs(self.estimation_mode)
        layers = checks.apply_policy(
            layers, self.on_unmatched, inputs=inputs, quiet=quiet
        )
        if inputs:
            layers = checks.of_inputs(layers)
        if self.factor_dtype is not None:
            narrow = self.factor_dtype
            layers = tuple(dataclasses.replace(x, factor_dtype=narrow) for x in layers)
        grouped = self.structure.group(
            Uses(
                layers,
                sites,
                found.graph,
                self.l2,
                goes_around_rules(traced, sites),
            )
        )
        own = {
            x.name: x for x in layers_of(grouped.groups)
        }  # a structure may change them
        layers = tuple(own[layer.name] for layer in layers)
        more = notes(layers, sites)
        grouped = grouped._replace(notes=(*grouped.notes, *more))
        return Derived(traced, layers, sites, grouped, rules)

    def _layers(
        self,
        graph: Graph,
        uses: Sequence[Use],
        parts: Sequence[Part],
        rules: Collection[int],
    ) -> tuple[tuple[Layer, ...], dict[str, list[Site]]]:
        """The layers and their sites, from what discovery found."""
        uses = custom_rules.without(graph, uses, rules)
        inputs = of_inputs(self.estimation_mode)
        if not needs_rng(self.estimation_mode) and not inputs:
            mode = self.estimation_mode
            where = f"; only sampled modes can tell them apart, not {mode!r}"
            uses = [
                mixed(use, where) if isinstance(use, Site) and use.cases else use
                for use in uses
            ]
        return make_layers(
            uses,
            self.tree.paths,
            self.tree.shapes,
            self.tree.dtypes,
            self.blocks,
            self.weight_sharing,
            parts,
            inputs,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """The layers and groups of one trace of the loss function.

    Attributes:
      traced: the program, and the results of discovery.
      layers: its layers.
      sites: for each layer name, its uses.
      grouped: its groups.
      kept_rules: the functions with uses inside whose derivative rule is kept.
    """

    traced: Traced
    layers: tuple[Layer, ...]
    sites: Mapping[str, Sequence[Site]]
    grouped: Grouped
    kept_rules: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Options):
    """A static, hashable plan: parameters → layers → groups."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...] = dataclasses.field(repr=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)
    in_batch: tuple[bool, ...] = dataclasses.field(default=(), repr=False)
    lost_examples: str = dataclasses.field(default="", repr=False, compare=False)

    def tapped(self, params: Params, args: Any) -> tuple[Derived, Program]:
        """Traces the loss function again, and places the plan's taps.

        Raises:
          ValueError: if the program's layers are not the plan's.
        """
        derived = self.derive(params, args, quiet=True)
        mine = {x.names: x.signature for x in self.groups}
        theirs = {x.names: x.signature for x in derived.grouped.groups}
        if mine != theirs:
            both = mine.keys() | theirs.keys()
            changed = {x for x in both if mine.get(x) != theirs.get(x)}
            raise ValueError(
                "The loss function uses its parameters differently from when the plan "
                f"was made: layers {sorted({n for x in changed for n in x})} changed. "
                "Make a new plan with make_curvature for these arguments."
            )
        return derived, tapped_program(derived.traced, self.groups, derived.sites)
