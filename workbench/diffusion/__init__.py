"""Noise schedule, the U-Net split at its bottleneck, models, sampling, replay, inversion, training."""
