"""How wide the decoder is: the same shares of the default width as in the paper."""

PAPER = "Table 1b"
GRID = {"decoder.width": {"cpu": (16, 32, 64, 96, 128), "gpu": (32, 64, 128, 192, 256)}}
POINTS = (("128", 84.9, 69.1), ("256", 84.8, 71.3), ("512", 84.9, 73.5), ("768", 84.4, 73.1), ("1024", 84.3, 73.1))
