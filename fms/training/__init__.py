"""Pre-training and tuning."""
