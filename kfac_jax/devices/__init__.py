"""Who does what on several devices, and how they exchange it."""

from typing import Any

from kfac_jax._utils.arguments import shown
from kfac_jax.devices.alone import Alone as Alone
from kfac_jax.devices.base import Devices as Devices
from kfac_jax.devices.base import Task as Task
from kfac_jax.devices.over_axis import OverAxis as OverAxis
from kfac_jax.devices.over_mesh import OverMesh as OverMesh

Sharing = OverAxis | OverMesh
"""What users name; None stands for `Alone`."""

ALONE = Alone()


def checked(devices: Any, name: str = "devices") -> Devices:
    """The devices that an argument stands for.

    Args:
      devices: an `OverAxis`, an `OverMesh` or None.
      name: how errors call the argument.

    Returns:
      The devices, `ALONE` for None.

    Raises:
      TypeError: if they are none of those.
    """
    if devices is None:
        return ALONE
    if not isinstance(devices, Sharing):
        raise TypeError(
            f"{name} must be None, kfac_jax.OverAxis(axis name) or "
            f"kfac_jax.OverMesh(mesh); got {shown(devices)}."
        )
    return devices
