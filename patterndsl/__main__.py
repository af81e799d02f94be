"""`python -m patterndsl.cli`."""

from __future__ import annotations

import sys

from patterndsl.cli import main

sys.exit(main())
