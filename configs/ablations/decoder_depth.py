"""How deep the decoder is: its blocks."""

PAPER = "Table 1a"
GRID = {"decoder.depth": (1, 2, 4, 8, 12)}
POINTS = (("1", 84.8, 65.5), ("2", 84.9, 70.0), ("4", 84.9, 71.9), ("8", 84.9, 73.5), ("12", 84.4, 73.3))
