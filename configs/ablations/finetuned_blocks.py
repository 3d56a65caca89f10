"""How many of the encoder's last blocks are fine-tuned, from one pretrained run; none: a linear classifier."""

PAPER = "Figure 9"
VERB = "finetune"
GRID = {"finetune.blocks": {"cpu": (0, 1, 2, 4, 6), "gpu": (0, 1, 2, 4, 12)}}
POINTS = (("0", 73.5, None), ("1", 81.0, None), ("2", 83.1, None), ("4", 84.2, None), ("24, all", 84.9, None))
