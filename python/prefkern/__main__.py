"""``python -m prefkern``."""

import sys

from prefkern.commands import main

sys.exit(main())
