"""``python -m torchclust`` is ``torchclust``."""

import sys

from torchclust.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
