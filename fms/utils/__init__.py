"""Configurations, checkpoints, tokenizers, generation."""
