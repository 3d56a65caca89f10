"""Which patches are hidden: drawn at random, in blocks, or all but a grid."""

PAPER = "Table 1f"
GRID = {"mask.sampler": ("random", "block", "block", "grid"), "mask.ratio": (0.75, 0.5, 0.75, 0.75)}
POINTS = (("random 75", 84.9, 73.5), ("block 50", 83.9, 72.3), ("block 75", 82.8, 63.9), ("grid 75", 84.0, 66.0))
