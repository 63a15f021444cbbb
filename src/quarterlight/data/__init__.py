"""What models are trained and judged on: retrieval datasets on disk, and the batches drawn from them."""

from __future__ import annotations
