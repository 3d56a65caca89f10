"""Single flipped bits, planted into one device's copy of an array."""

import jax
import numpy as np


def flip(array: jax.Array, device: jax.Device, element: int, bit: int) -> jax.Array:
    """The same global array, but for one bit of one element of what lies on `device`."""
    blocks = []
    for shard in array.addressable_shards:
        block = np.array(shard.data)
        if shard.device == device:
            raw = block.reshape(-1).view(np.uint8)
            raw[element * block.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)
        blocks.append(jax.device_put(block, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, blocks)
