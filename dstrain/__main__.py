"""``python -m dstrain`` is ``dstrain``."""

import sys

from dstrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
