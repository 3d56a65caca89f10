"""How images are augmented: not at all, crops of a fixed size, of random sizes, and these with color jitter."""

PAPER = "Table 1e"
GRID = {
    "data.crop": ("center", "fixed", "random_resized", "random_resized"),
    "data.flip": ("false", "true", "true", "true"),
    "data.color_jitter": (0, 0, 0, 0.4),
}
POINTS = (
    ("none", 84.0, 65.7),
    ("crop, fixed size", 84.7, 73.1),
    ("crop, random size", 84.9, 73.5),
    ("crop + color jit", 84.3, 71.9),
)
