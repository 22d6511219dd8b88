"""Lets the tests of this folder, and the ones run under Triton's interpreter, share `nvfp4_cases`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
