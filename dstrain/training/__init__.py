"""The training loop, and what belongs to it; it knows no Trainer."""
