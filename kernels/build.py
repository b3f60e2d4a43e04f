"""Compiles a source of this folder once, and loads it.

    library = load("attention.cpp")         a ctypes library, or None where that cannot be done

The result lies in the user's cache folder, under a name made of all that it depends on: the source,
the compiler, and the processor's abilities. It is written aside and renamed, so a build that was
killed leaves nothing that anybody waits for, and two that run at once do no harm.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger("kernels")

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-ffp-contract=fast"]
if sys.platform == "darwin":
    FLAGS += ["-Xclang", "-fopenmp"]
    LINK = ["-dynamiclib", "-undefined", "dynamic_lookup"]
else:
    FLAGS += ["-fopenmp"]
    # Without OpenMP's library: its functions are found in the one that torch has loaded. A second
    # one would bring threads of its own, and all would wait for each other.
    LINK = ["-shared"]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanokeye"


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of the usual names. FileNotFoundError: none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise FileNotFoundError(f"no C++ compiler ({', '.join(names)})")


def run(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise OSError(f"{Path(command[0]).name}: {said[0].strip()}")
    return done.stdout


def build(source: Path) -> Path:
    """The compiled library. OSError where there is no compiler, or it fails."""
    cxx = compiler()
    # what the compiler defines by itself names its version and all that this processor can do
    abilities = run(cxx, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    facts = [source.read_text(), cxx, abilities, *FLAGS, *LINK]
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            objects, library = Path(aside, "a.o"), Path(aside, "a.so")
            run(cxx, *FLAGS, "-c", str(source), "-o", str(objects))
            run(cxx, *LINK, str(objects), "-o", str(library))
            os.replace(library, target)
    return target


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of a source beside this file, built where need be. None, with a warning: no way.

    Import torch first: OpenMP's functions come from it.
    """
    try:
        return ctypes.CDLL(str(build(Path(__file__).with_name(name))))
    except OSError as e:
        log.warning("kernels/%s is not used, PyTorch's operators are: %s", name, e)
        return None
