"""`python -m maskgen` is the `maskgen` command."""

import sys

from maskgen.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
