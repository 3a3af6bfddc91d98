"""The Hub server of tests/hub serves data sets here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
