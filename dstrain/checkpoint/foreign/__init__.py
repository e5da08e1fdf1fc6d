"""Checkpoints that other programs wrote: DeepSpeed's and those of plain PyTorch."""
