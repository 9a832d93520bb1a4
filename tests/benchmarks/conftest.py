"""Tests of the benchmarks import their files by name, as the scripts do among each other."""

from __future__ import annotations

import sys

from tests import ROOT

sys.path.append(str(ROOT / "benchmarks"))
