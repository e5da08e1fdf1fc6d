"""Comparison of the samples that ranks read: the same, the same with noise, or different ones."""
