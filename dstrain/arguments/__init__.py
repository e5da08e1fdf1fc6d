"""What a user writes down: dataclasses that import no torch."""

from dstrain.arguments.training_arguments import TrainingArguments

__all__ = ["TrainingArguments"]
