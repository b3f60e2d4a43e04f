"""Compiles a source of this folder once, and loads it.

    library = load("attention.cpp")         a ctypes library, or None where that cannot be done
    library = load("attention.cu")          the same by NVIDIA's compiler, for GPUs; hopper*.cu too

The result lies in the user's cache folder, under a name made of all that it depends on: the source,
its headers, the compiler, and the processor's abilities. It is written aside and renamed, so a
build that was killed leaves nothing that anybody waits for, and two that run at once do no harm.
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

import torch

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


def run(*command, folder=None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise OSError(f"{Path(command[0]).name}: {said[0].strip()}")
    return done.stdout


def cuda_compiler() -> str:
    """nvcc. FileNotFoundError: none."""
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))
    if path is None:
        raise FileNotFoundError("no CUDA compiler (nvcc)")
    return path


def cuda_flags(name: str) -> list[str]:
    """Machine code for sm_80 and for the GPU that is here, and PTX that later ones translate.

    hopper*.cu: for sm_90a alone, whose instructions no other GPU has.
    """
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static"]
    if name.startswith("hopper"):
        return [*flags, "-gencode=arch=compute_90a,code=sm_90a"]
    flags += ["-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) > (8, 0):
            flags += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"]
    return flags


def commands(source: Path) -> tuple[list[list[str]], list[str]]:
    """What makes a.so of the source, and all facts beside the source that it depends on."""
    if source.suffix == ".cu":
        nvcc, flags = cuda_compiler(), cuda_flags(source.name)
        facts = [nvcc, run(nvcc, "--version"), *flags]
        return [[nvcc, *flags, str(source), "-o", "a.so"]], facts
    cxx = compiler()
    # what the compiler defines by itself names its version and all that this processor can do
    abilities = run(cxx, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    compiling = [cxx, *FLAGS, "-c", str(source), "-o", "a.o"]
    return [compiling, [cxx, *LINK, "a.o", "-o", "a.so"]], [cxx, abilities, *FLAGS, *LINK]


def build(source: Path) -> Path:
    """The compiled library. OSError where there is no compiler, or it fails."""
    steps, facts = commands(source.absolute())
    # what the source may include
    headers = sorted(source.parent.glob("*.cuh" if source.suffix == ".cu" else "*.cpp"))
    facts = [*(file.read_text() for file in [source, *headers]), *facts]
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            for command in steps:
                run(*command, folder=aside)
            os.replace(Path(aside, "a.so"), target)
    return target


def instead(name: str) -> str:
    if name.startswith("hopper"):
        return "attention.cu, for any GPU, is"
    return "PyTorch's operators are"


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of a source beside this file, built where need be. None, with a warning: no way.

    torch was imported above: OpenMP's functions come from it.
    """
    try:
        return ctypes.CDLL(str(build(Path(__file__).with_name(name))))
    except OSError as e:
        log.warning("kernels/%s is not used, %s: %s", name, instead(name), e)
        return None
