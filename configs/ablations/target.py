"""What is regressed: pixels, pixels normalised per patch, or an eighth of a patch's principal components."""

PAPER = "Table 1d"
GRID = {"objective": ("mae", "mae", "pca"), "norm_pix": ("false", "true", "false")}
POINTS = (("pixel, w/o norm", 84.9, 73.5), ("pixel, w/ norm", 85.4, 73.9), ("PCA", 84.6, 72.3))
