"""`python -m fastelbo` is the `fastelbo` command."""

import sys

from fastelbo.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
