"""How long pretraining is; a twentieth of it is warm-up."""

PAPER = "Figure 7"
GRID = {
    "total_epochs": {"cpu": (1, 2, 4, 8, 16), "gpu": (12.5, 25, 50, 100, 200)},
    "warmup_epochs": {"cpu": (0.05, 0.1, 0.2, 0.4, 0.8), "gpu": (0.625, 1.25, 2.5, 5, 10)},
}
POINTS = (
    ("100 epochs", 82.3, 57.3),
    ("200 epochs", 83.3, 64.4),
    ("400 epochs", 84.3, 69.7),
    ("800 epochs", 84.9, 73.5),
    ("1600 epochs", 85.1, 75.1),
)
