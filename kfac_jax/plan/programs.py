"""Programs that are run in place of the loss function: with taps, or shortened."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax import Array

from kfac_jax._jaxpr import slicing
from kfac_jax._jaxpr.graph import Graph, Place
from kfac_jax._jaxpr.interpreter import Gather, Probe, Program, Tap, replaces_rules
from kfac_jax._jaxpr.sites import Site
from kfac_jax.plan.group import Group
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.tracing import Traced


def bare_program(traced: Traced) -> Program:
    """The program without taps."""
    return Program(traced.found.as_written, {}, {})


def outputs_program(traced: Traced) -> Program:
    """The equations that the registered losses depend on, without taps."""
    graph = traced.found.as_written
    return Program(slicing.without_rest(graph, _tags(graph)), {}, {})


def split_program(program: Program) -> tuple[Program, Program]:
    """The equations that the registered losses depend on, and the rest without taps."""
    first, rest = slicing.split(program.graph, _tags(program.graph))
    return dataclasses.replace(program, graph=first), Program(rest, {}, {})


def _tags(graph: Graph) -> set[int]:
    """The ids of the loss tags' results."""
    return {
        out for node in graph.walk() if node.name == "kfac_loss" for out in node.outputs
    }


def tapped_program(
    traced: Traced, groups: Sequence[Group], sites: Mapping[str, Sequence[Site]]
) -> Program:
    """The program with a tap at each site of each layer.

    Args:
      traced: the traced loss function.
      groups: the groups, which compute what taps gather.
      sites: for each layer name, its uses.

    Returns:
      The program, which takes probes by layer name.
    """
    taps: dict[Place, list[Tap]] = {}
    scanned: dict[int, frozenset[str]] = {}
    for group in groups:
        for layer in group.layers:
            for site in sites[layer.name]:
                name, carried = group.tap(layer, site)
                tap = Tap(name, site.x, _gather(group, layer, site), carried)
                taps.setdefault(site.output, []).append(tap)
                for scan in site.scans:
                    scanned[scan] = scanned.get(scan, frozenset()) | {name}
    found = traced.found
    return Program(found.graph, taps, scanned, found.constant_means)


def _gather(group: Group, layer: Layer, site: Site) -> Gather:
    def gather(x: Array | None, dy: Array, carried: Probe) -> Probe:
        return group.gather(layer, site, x, dy, carried)

    return gather


def goes_around_rules(traced: Traced, sites: Mapping[str, Sequence[Site]]) -> bool:
    """Whether taps at those sites would bypass a custom derivative rule."""

    def nothing(x: Array | None, dy: Array, carried: Probe) -> Probe:
        return {}

    taps = {
        site.output: [Tap(name, site.x, nothing)]
        for name, places in sites.items()
        for site in places
    }
    return replaces_rules(Program(traced.found.graph, taps, {}))
