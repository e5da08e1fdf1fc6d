"""Tasks: each reads its data, builds its model, and measures its results."""
