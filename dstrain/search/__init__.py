"""Hyperparameter search; loaded when used."""
