"""Which device does what."""

from collections.abc import Sequence


def assign(sizes: Sequence[int], devices: int) -> list[int]:
    """Gives matrices owners: the largest first, each to the device with least to do.

    Args:
      sizes: d of each `d × d` matrix; its cost is d³.
      devices: how many there are.

    Returns:
      The owner of each.

    >>> assign([4, 2, 2, 2, 3], 2)
    [0, 1, 1, 1, 1]
    """
    loads = [0] * devices
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        device = loads.index(min(loads))
        owners[i] = device
        loads[device] += sizes[i] ** 3
    return owners
