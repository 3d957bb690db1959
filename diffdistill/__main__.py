"""`python -m diffdistill`."""

import sys

from diffdistill.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
