"""Whether the encoder is given mask tokens for the hidden patches, and what that costs (images per second)."""

PAPER = "Table 1c"
GRID = {"model.mask_tokens": ("true", "false")}
POINTS = (("with [M], 3.3 x the FLOPs", 84.2, 59.6), ("without", 84.9, 73.5))
