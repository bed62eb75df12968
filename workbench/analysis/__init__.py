"""Intervals, maps and dimension of h-space, probes, statistics of latents, criteria of the mixing step, metrics."""
