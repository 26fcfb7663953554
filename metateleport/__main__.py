"""`python -m metateleport`, which `torchrun -m` starts in every process."""

import sys

from metateleport.cli import main

if __name__ == "__main__":
    sys.exit(main())
