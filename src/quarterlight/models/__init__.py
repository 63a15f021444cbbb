"""Backbones, pooling, checkpoints and the embedder."""
