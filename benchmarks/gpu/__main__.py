"""`python3 -m benchmarks.gpu`: see `benchmarks.gpu.command`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
