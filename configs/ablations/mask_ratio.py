"""What share of the patches is hidden."""

PAPER = "Figure 5"
GRID = {"mask.ratio": (0.3, 0.5, 0.6, 0.75, 0.9)}
POINTS = (("30 %", 83.4, 61.7), ("50 %", 84.9, 69.9), ("60 %", 85.0, 71.8), ("75 %", 84.9, 73.5), ("90 %", 83.0, 66.1))
