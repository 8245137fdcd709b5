"""`python -m maskgen` is the `maskgen` command."""

import sys

from maskgen.cli import main

sys.exit(main())
