"""Tiny models of many families, and small ragged batches for them."""
