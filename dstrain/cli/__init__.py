"""The command line: ``dstrain train``, ``dstrain explain``, ``dstrain plan``."""
