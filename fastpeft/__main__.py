"""`python -m fastpeft`"""

import sys

from fastpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
