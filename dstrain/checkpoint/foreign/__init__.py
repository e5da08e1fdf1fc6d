"""Reading of checkpoints that other programs wrote: DeepSpeed and transformers' Trainer."""
