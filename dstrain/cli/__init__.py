"""The command line: ``dstrain train``, ``dstrain explain``."""
