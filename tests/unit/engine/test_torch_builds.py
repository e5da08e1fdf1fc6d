"""What is corrected of torch's builds, on a library of one line."""

import subprocess

from tests.hosts import make_repository
from tests.launch import quiet_environment

BUILD = """
import sys, torch
from torch.utils import cpp_extension
from dstrain.engine.torch_builds import quote_library_folder
assert " " in cpp_extension.TORCH_LIB_PATH, cpp_extension.TORCH_LIB_PATH
quote_library_folder()
quote_library_folder()  # of each Trainer
print(cpp_extension.load("one", sys.argv[1], is_python_module=False))
"""


def test_an_op_is_built_where_the_path_of_torch_has_a_blank(tmp_path):
    """torch gives the folder of its libraries to the linker unquoted."""
    repository = make_repository(tmp_path / "with a blank", "")
    source = repository / "one.cpp"
    source.write_text("int one() { return 1; }\n")
    done = subprocess.run(
        [repository / ".venv" / "bin" / "python", "-c", BUILD, source],
        env=quiet_environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "the ops")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "the ops" / "one" / "one.so").exists()
