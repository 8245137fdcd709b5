"""`python -m maskgen` is the `maskgen` command."""

import sys

from maskgen.cli.parser import main

sys.exit(main())
