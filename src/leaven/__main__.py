"""``python -m leaven`` is the ``leaven`` command."""

import sys

from leaven.cli import main

if __name__ == "__main__":
    sys.exit(main())
