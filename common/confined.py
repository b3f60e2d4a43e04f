"""Real Python for a model that thinks with images, in a child process that can only compute.

    outcome = run_child("show(image.rotate(90))", [picture])    # .ok, .text, .images
    reason = refusal()                                          # None where it can be had

Code and pictures go in; what the code printed and showed comes out, or the error that ended it.
The parent starts a fresh interpreter and gives it a message in a file in memory. The child loads
its libraries, gives up everything but computing and writing by rlimits, capabilities and a seccomp
filter, and only then runs the code. It answers in a second file in memory, which the parent reads
as the bytes of a stranger. Linux on x86_64 and aarch64 only.

Not covered: holes in the kernel or the processor. common/sandbox.py decides what reaches the
transcript.
"""

import importlib
import io
import math
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

# All limits of both levels are ours: Keye states none. They are far above what a crop, a turn and
# a printed number need, and far below what would slow a rollout down.
TEXT = 1_000  # characters that come back
IMAGES = 4  # pictures that come back
LARGEST = 16_000_000  # pixels of one result
NARROW = 100  # longest side over shortest; the processor takes 200
# Of a child:
MEMORY = 1 << 30  # bytes, beside its pictures
SECONDS = 5  # of computing
WALL = 20.0  # seconds until it is killed, even if it sleeps
ANSWER = 3 * LARGEST + 20 * TEXT  # bytes that it can write


@dataclass
class Outcome:
    """What a child's code came to. ok: False when text is the error that ended it."""

    ok: bool
    text: str
    images: list[Image.Image]  # RGB


def too_narrow(width: int, height: int) -> bool:
    """Or without any pixel."""
    return not 0 < max(width, height) <= NARROW * min(width, height)


def area(images: list[Image.Image]) -> int:
    """Pixels in all."""
    return sum(image.width * image.height for image in images)


# --------------------------------------------------------------------------------------------------
# messages between parent and child: HEADER, the text, and for each picture SIZE and its pixels

HEADER = struct.Struct("<III")  # seconds of computing (to the child) or ok; bytes of text; pictures
SIZE = struct.Struct("<II")  # width, height


def pack(number, text, images):
    """Yields a message, piece by piece. images: RGB."""
    data = text.encode("utf-8", "replace")
    yield HEADER.pack(number, len(data), len(images)) + data
    for image in images:
        yield SIZE.pack(*image.size) + image.tobytes()


def unpack(message, most_images):
    """-> what pack was given. ValueError or struct.error for what is not one whole message.

    It may come from hostile code: there is no pickle and no picture decoder here, and no size is
    believed before the bytes are there.
    """
    number, length, count = HEADER.unpack_from(message)
    if count > most_images:
        raise ValueError("too many pictures")
    end = HEADER.size + length
    text = message[HEADER.size : end].decode("utf-8", "replace")
    images = []
    for _ in range(count):
        size = SIZE.unpack_from(message, end)
        start = end + SIZE.size
        end = start + 3 * math.prod(size)
        if 0 in size or end > len(message):
            raise ValueError("a picture without its pixels")
        images.append(Image.frombytes("RGB", size, message[start:end]))
    if end != len(message):
        raise ValueError("bytes are missing or left over")
    return number, text, images


# --------------------------------------------------------------------------------------------------
# the parent's side

START = "import sys; sys.path += {!r}; from common import confined; confined.child()"
# All of the child's environment. Threads are not allowed.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@cache
def refusal() -> str | None:
    """Why Python cannot be confined here; None where it can, as a first child has shown."""
    system = platform.system()
    machine = platform.machine()
    if system != "Linux" or machine not in MACHINES:
        known = " or ".join(MACHINES)
        return f"it is confined by seccomp on 64-bit Linux, {known}; this is {system} {machine}"
    outcome = run_child("print(6 * 7)", [])
    return None if outcome.text == "42\n" else outcome.text


def run_child(code: str, images: list[Image.Image]) -> Outcome:
    """Runs code on pictures of any mode. Raises nothing, whatever the code does."""
    try:
        status, message = answer_of(code, images)
        if message:
            ok, text, shown = unpack(message, IMAGES)
            if any(too_narrow(*image.size) for image in shown):
                raise ValueError("a picture is too narrow")
            return Outcome(bool(ok), text, shown)
        reason = "the program crashed, perhaps out of memory"
        if status == -signal.SIGKILL:
            reason = f"stopped after {SECONDS} seconds of computing"
    except subprocess.TimeoutExpired:
        reason = f"no result after {WALL:.0f} seconds"
    except OSError as error:
        reason = f"no child process: {error}"
    except (ValueError, struct.error):
        reason = "the result cannot be read"
    return Outcome(False, reason, [])


def answer_of(code, images):
    """-> the child's exit status and all it wrote. Raises TimeoutExpired, OSError.

    The child is a new interpreter, not a fork: nothing of this process is in its memory, its
    environment or its open files.
    """
    # It finds modules where this process does.
    folders = [os.path.abspath(folder) for folder in sys.path]
    with memory_file("given") as given, memory_file("answer") as answer:
        given.writelines(pack(SECONDS, code, [image.convert("RGB") for image in images]))
        given.seek(0)
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", START.format(folders)],
            stdin=given,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            timeout=WALL,
        )
        answer.seek(0)
        return child.returncode, answer.read()


def memory_file(name):
    return os.fdopen(os.memfd_create(name), "w+b")


# --------------------------------------------------------------------------------------------------
# the child's lock


@dataclass
class Machine:
    """Numbers of one machine, from Linux: arch/x86/entry/syscalls, asm-generic/unistd.h."""

    audit: int  # AUDIT_ARCH: which table of system calls a number is of
    seccomp: int  # the number of seccomp itself
    allowed: dict[str, int]


# All system calls that the child keeps, with their numbers on x86_64 and aarch64.
CALLS = """
    write             1       64
    mmap              9      222
    mprotect         10      226
    munmap           11      215
    brk              12      214
    mremap           25      216
    rt_sigprocmask   14      135
    rt_sigreturn     15      139
    futex           202       98
    exit             60       93
    exit_group      231       94
    gettimeofday     96      169
    clock_gettime   228      113
    getrandom       318      278
"""


def allowed(column):
    rows = [row.split() for row in CALLS.strip().splitlines()]
    return {row[0]: int(row[column]) for row in rows}


MACHINES = {
    "x86_64": Machine(0xC000003E, 317, allowed(1)),
    "aarch64": Machine(0xC00000B7, 277, allowed(2)),
}

# Answers of a filter. DENY is with errno 1, EPERM.
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000
# Instructions of a filter (Linux: uapi/linux/bpf_common.h).
LOAD, EQUAL, ANY_BIT, ANSWER_WITH = 0x20, 0x15, 0x45, 0x06


def instruction(opcode, value, if_true=0, if_false=0):
    """if_true, if_false: how many of the next instructions a comparison skips."""
    return struct.pack("HBBI", opcode, if_true, if_false, value)


def seccomp_filter(machine):
    """The filter as a BPF program: what is not allowed is denied.

    It reads struct seccomp_data: the call's number at byte 0, AUDIT_ARCH at 4, argument 3 at 32.
    """
    program = [
        # The table of 32-bit calls has other calls under these numbers.
        instruction(LOAD, 4),
        instruction(EQUAL, machine.audit, if_true=1),
        instruction(ANSWER_WITH, KILL),
        instruction(LOAD, 0),
    ]
    for name, number in machine.allowed.items():
        allow = [instruction(ANSWER_WITH, ALLOW)]
        if name in ("mmap", "mprotect"):
            # No memory can be made executable: that is PROT_EXEC, 4, in argument 3.
            deny = instruction(ANSWER_WITH, DENY)
            allow = [instruction(LOAD, 32), instruction(ANY_BIT, 4, if_false=1), deny, *allow]
        program += [instruction(EQUAL, number, if_false=len(allow)), *allow]
    return b"".join([*program, instruction(ANSWER_WITH, DENY)])


def lock(memory, seconds):
    """Gives up for good what computing does not need. OSError where that cannot be done.

    memory: bytes of address space. seconds: of computing from now.
    """
    limit_resources(memory, seconds)
    drop_rights(MACHINES[platform.machine()])
    # Is the filter in force? Only a filter can refuse getppid, which has no errors and asks for no
    # permission: to open a file, say, may be refused by the file's mode as well.
    if os.getppid() != -1:
        raise OSError("the seccomp filter is not in force")


def limit_resources(memory, seconds):
    import resource  # not on Windows

    limits = {
        # The start took some time already.
        resource.RLIMIT_CPU: round(time.process_time() + seconds),
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: ANSWER,
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)  # a hard limit cannot be raised
        resource.setrlimit(limit, (most, most))


def drop_rights(machine):
    """All capabilities, then all system calls but the machine's allowed ones."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_ulong] * 5
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p]

    def must_succeed(name, status):
        if status != 0:
            raise OSError(ctypes.get_errno(), f"{name} was refused")

    # What root may: version 3 of the interface, this process, three empty sets of 64 bits.
    must_succeed("capset", libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    # PR_SET_PDEATHSIG: it ends with its parent.
    must_succeed("pdeathsig", libc.prctl(1, signal.SIGKILL, 0, 0, 0))
    # PR_SET_NO_NEW_PRIVS: without it a filter takes root.
    must_succeed("no_new_privs", libc.prctl(38, 1, 0, 0, 0))
    # SECCOMP_SET_MODE_FILTER with a struct sock_fprog, on all threads of this process.
    program = seccomp_filter(machine)
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    must_succeed("seccomp", libc.syscall(machine.seccomp, 1, 1, fprog))


# --------------------------------------------------------------------------------------------------
# the child's side

# What the code can import: once the lock is in force, nothing more can be loaded.
MODULES = """
    _strptime collections copy datetime decimal fractions functools io itertools json math os
    random re statistics string time unicodedata
    encodings.ascii encodings.cp1252 encodings.latin_1 encodings.raw_unicode_escape
    encodings.unicode_escape encodings.utf_16 encodings.utf_16_be encodings.utf_16_le
    encodings.utf_32 encodings.utf_8_sig
    numpy numpy.fft numpy.linalg numpy.random
    PIL.Image PIL.ImageChops PIL.ImageDraw PIL.ImageEnhance PIL.ImageFile PIL.ImageFilter
    PIL.ImageFont PIL.ImageOps PIL.ImageStat
""".split()


def child():
    """Reads code and pictures, locks itself in, runs the code, writes one answer."""
    try:
        with open(0, "rb") as given:
            seconds, code, images = unpack(given.read(), most_images=sys.maxsize)
        for name in MODULES:
            importlib.import_module(name)
        lock(MEMORY + 16 * area(images), seconds)
    except (OSError, ImportError) as error:
        write_answer(False, str(error))
    shown = []
    names = starting_names(images, shown)
    printed = io.StringIO()
    sys.stdout = sys.stderr = printed
    error = execute(code, names)
    if error:
        write_answer(False, error)
    write_answer(True, printed.getvalue()[: 4 * TEXT], shown)


def add_picture(picture, shown):
    """picture: PIL, or uint8 (H, W[, 3])."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    width, height = picture.size
    too_large = area([*shown, picture]) > LARGEST
    if len(shown) == IMAGES or too_large or too_narrow(width, height):
        raise ValueError(
            f"{width}x{height} cannot be shown: {IMAGES} pictures, {LARGEST} pixels in all, "
            "none too narrow"
        )
    shown.append(picture.convert("RGB"))


def starting_names(images, shown):
    """The names that the code starts with. shown: the list that show() appends to.

    Keye's code (report, figure 11) opens the picture by its path, saves its result under a new one
    and prints that. Here no path is looked at: it opens the one picture, and saving is showing.
    """

    def open_picture(path, *_, **__):
        if len(images) != 1 or not isinstance(path, str):
            raise ValueError(
                f"Image.open takes the path of the one picture; here are {len(images)}: "
                "use images[i]"
            )
        return images[0].copy()

    def show(picture, *_, **__):
        add_picture(picture, shown)

    Image.open = open_picture
    Image.Image.save = show
    os.makedirs = lambda *_, **__: None
    return {
        "__name__": "__main__",
        "show": show,
        "images": images,
        "image": images[0] if images else None,
        "Image": Image,
        "np": np,
        "math": math,
        "os": os,
        "random": random,
        "re": re,
    }


def execute(code, names):
    """-> the error that ended the code, with its line; None where there was none."""
    try:
        exec(compile(code, "code", "exec"), names)
    except BaseException as error:  # KeyboardInterrupt or a class of its own is just its failure
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            return None  # exit() and exit(1) say nothing, exit("why") does
        where = ""
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == "code":
                where = f"line {line}: "
        # What fills the memory must go before there is space for an answer.
        error.__traceback__ = None
        names.clear()
        return f"{where}{type(error).__name__}: {str(error)[:300]}"
    return None


def write_answer(ok, text, images=()):
    for piece in pack(ok, text, images):
        os.write(1, piece)
    os._exit(0)
