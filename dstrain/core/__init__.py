"""Errors, rank facts and collectives, seeds, logging. Imports no other package of dstrain."""
