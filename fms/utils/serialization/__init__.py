"""Checkpoints: formats read and written, by tables."""
