"""What accelerators can do, by their data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Attributes:
    peak: dense bfloat16, FLOP/s.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    links: bytes/s that a chip sends to its neighbors, one way, all its links together.
    clock: Hz of a TPU's cores; 0 for GPUs.
    """

    peak: float
    memory: float
    bandwidth: float
    links: float
    clock: float = 0.0


# TPUs: memory as in jax's own table (jax/_src/pallas/mosaic/tpu_info.py), peaks and bandwidths as in Google's pages on
# each version, links as in the scaling book (v4 and v5p: 3-D torus, 6 links; v5e and v6e: 2-D, 4 links). A clock is the
# peak over the products that jax's table says a chip does in a cycle: units x side^2 x 2 FLOP x cores. For v6e that
# would give 3.5 GHz; taken is half of it, at which the compiler's estimate of an 8192^3 product is 70 % of the peak
# (v4: 93 %, v5e 88, v5p 90): of v6e's times the least is known.
# GPUs: the makers' data sheets, links being NVLink one way.
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 34.4e9, 1.228e12, 6 * 45e9, 1.05e9),
    "v5e": Chip(197e12, 17.2e9, 0.819e12, 4 * 45e9, 1.50e9),
    "v5p": Chip(459e12, 103e9, 2.765e12, 6 * 90e9, 1.75e9),
    "v6e": Chip(918e12, 34.4e9, 1.638e12, 4 * 90e9, 1.75e9),
    "a100": Chip(312e12, 80e9, 2.04e12, 300e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "b200": Chip(2250e12, 180e9, 8e12, 900e9),
}

# Peaks by a part of `device_kind`, the first that fits (a v5p calls itself "TPU v5"), for the model FLOPs utilisation;
# with chips that only train, and are not planned for.
PEAK_FLOPS = {
    "v6": CHIPS["v6e"].peak, "v5 lite": CHIPS["v5e"].peak, "v5e": CHIPS["v5e"].peak, "v5": CHIPS["v5p"].peak,
    "v4": CHIPS["v4"].peak, "v3": 123e12, "B200": CHIPS["b200"].peak, "H200": CHIPS["h200"].peak,
    "H100": CHIPS["h100"].peak, "A100": CHIPS["a100"].peak, "V100": 125e12,
}  # fmt: skip
