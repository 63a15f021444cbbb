"""Losses: tensors in, one number out. No files, models or processes."""
