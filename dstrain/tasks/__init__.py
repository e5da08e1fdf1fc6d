"""Tasks: what to train on, and how its results are measured."""
