"""How well a model does: benchmarks and datasets in, numbers with their chance levels out."""

from __future__ import annotations
