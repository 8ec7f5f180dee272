"""`python -m ucc_search`."""

import os
import sys

# `python -m` puts the current folder first on the path: a file there would pass for any module of that name.
sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != os.path.realpath(os.curdir)]

from ucc_search.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
