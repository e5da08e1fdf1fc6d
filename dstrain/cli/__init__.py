"""Command line: ``dstrain train``, ``explain``, ``plan`` and ``checkpoint``."""
