"""Checkpoints of a run: format, commit, rotation, resume at any topology.

The room is here so that its place in the row is; what a run saves so far is the model
(``dstrain.models.save_model``) and its records.
"""
