"""``python -m bertology_serve``: the same as the command ``bertology-serve``."""

import sys

from bertology_serve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
