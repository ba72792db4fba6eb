"""Keys and values in tiles of positions, as those of all layers are laid out in one array.

A step on a CPU sums over the numbers of a key with positions in a vector's lanes, and over
positions with the numbers of a value in them (`tiled_attention`). With all positions of a room in a
row, the numbers of one position lie a power of two of bytes apart and evict each other from a
core's cache; in tiles, and these in the order of positions, a step reads one after the other.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

TILE = 64

# A layer's, or those of all layers.
Keys = Float[Array, "B K H S"] | Float[Array, "L B tiles K H width"]
Values = Float[Array, "B K S H"] | Float[Array, "L B tiles K width H"]


def tile_width(room: int) -> int:
    """Return how many positions lie in a tile where a row has room for so many."""
    return math.gcd(room, TILE)


def to_tiles(
    rows: Float[Array, "*any K X Y"], width: int, axis: int
) -> Float[Array, "*any tiles K X2 Y2"]:
    """Cut what has positions along `axis`, -1 or -2, into tiles of `width` of them."""
    positions = rows.shape[axis]
    before, after = rows.shape[:axis], rows.shape[axis:][1:]
    cut = rows.reshape(*before, positions // width, width, *after)
    return jnp.moveaxis(cut, axis - 1, -4)


def from_tiles(tiles: Float[Array, "*any tiles K X Y"], axis: int) -> Float[Array, "*any K X2 Y2"]:
    """Undo `to_tiles`."""
    cut = jnp.moveaxis(tiles, -4, axis - 1)
    return cut.reshape(*cut.shape[: axis - 1], -1, *cut.shape[axis:][1:])


def room_of(values: Any) -> int:
    """Return S, for how many positions a row has room."""
    is_tiled = values.ndim == 6
    return values.shape[-2] * (values.shape[-4] if is_tiled else 1)


def positions(
    tiles: Float[Array, "L B tiles K X Y"],
    layer: Int32[Array, ""],
    start: Int32[Array | np.int32, ""],
    size: int,
    *,
    axis: int,
) -> Float[Array, "B K X2 Y2"]:
    """Return a layer's `size` positions from `start` on, both multiples of the width."""
    width, zero = tiles.shape[axis], np.int32(0)
    where = (layer, zero, start // np.int32(width), zero, zero, zero)
    found = lax.dynamic_slice(tiles, where, (1, tiles.shape[1], size // width, *tiles.shape[3:]))
    return from_tiles(found[0], axis)
