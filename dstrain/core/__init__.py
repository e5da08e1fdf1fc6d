"""Errors, rank facts and collectives, seeds, logging. Imports nothing of ours."""
