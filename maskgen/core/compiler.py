"""Whether torch can compile for a processor here: it writes C++ and has it compiled, as a module of Python's."""

import shutil
import sysconfig
from functools import cache
from pathlib import Path


@cache
def has_cpp_compiler() -> bool:
    """Whether there are a C++ compiler that torch finds, and Python's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False
    return found and Path(sysconfig.get_path("include"), "Python.h").is_file()
