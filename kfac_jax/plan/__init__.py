"""Plans: a traced loss function, its layers, and the groups that these are in."""

from kfac_jax.plan.group import Group as Group
from kfac_jax.plan.layer import KINDS as KINDS
from kfac_jax.plan.layer import Layer as Layer
