"""How good a ranking is. NumPy only: no files, models or processes."""

from __future__ import annotations
