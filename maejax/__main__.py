"""Makes `python -m maejax ...` the same as `maejax ...`."""

import sys

from maejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
