"""``python -m dstrain`` is ``dstrain``."""

from dstrain.cli.main import entry

if __name__ == "__main__":
    entry()
