"""Build the extension modules; everything else about the project is in pyproject.toml.

Environment
-----------
PYSWAP_DEBUG=1   also build ``pyswap._fast_debug``: failpoints, counters and assertions.
PYSWAP_DEBUG=only  build that one instead, hardly optimised: for what builds it many times.
PYSWAP_SANITIZE=address,undefined  with those of the C compiler's sanitizers.
PYSWAP_WERROR=1  a warning of the C compiler is an error.
"""

import os
from glob import glob

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup

# Nothing below the Python layer may touch a Python object: no directive that raises by itself.
DIRECTIVES = {
    "language_level": "3",
    "boundscheck": False,
    "cdivision": True,
    "embedsignature": False,
    "initializedcheck": False,
    "nonecheck": False,
    "overflowcheck": False,
    "wraparound": False,
}

C_FLAGS = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra"]

ONLY_DEBUG = os.environ.get("PYSWAP_DEBUG") == "only"
if ONLY_DEBUG:
    C_FLAGS[0] = "-O0"
SANITIZE = [f"-fsanitize={n}" for n in os.environ.get("PYSWAP_SANITIZE", "").split(",") if n]
if SANITIZE:
    C_FLAGS[0] = "-O1"
    C_FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

# Every header of the machinery: all are compiled into the one extension.
DEPENDS = sorted(glob("pyswap/core/*.pxd") + glob("pyswap/core/*.h") + glob("pyswap/*.px[di]"))


def wanted(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def extension(
    name: str, source: str, *includes: str, include_dirs: list[str] | None = None, **macros: str
) -> Extension:
    return Extension(
        name,
        [source],
        include_dirs=include_dirs,
        depends=[*DEPENDS, *includes],
        define_macros=sorted(macros.items()),
        extra_link_args=SANITIZE,
        extra_compile_args=C_FLAGS + ["-Werror"] * wanted("PYSWAP_WERROR"),
    )


extensions = [
    extension("pyswap._fast", "pyswap/_fast.pyx"),
    # Apart from the machinery, which the swapper loads without NumPy.
    extension("pyswap._allocator", "pyswap/_allocator.pyx", include_dirs=[np.get_include()]),
]
# A library of its own, which knows nothing of Python: it may be preloaded.
extensions.append(
    Extension(
        "pyswap._shim",
        ["pyswap/_shim.c"],
        extra_compile_args=[*C_FLAGS, "-fvisibility=hidden"]
        + ["-Werror"] * wanted("PYSWAP_WERROR"),
        # What it calls by its own names is its own, not the C library's.
        extra_link_args=["-Wl,-Bsymbolic-functions"],
    )
)
if ONLY_DEBUG:
    extensions = [e for e in extensions if e.name != "pyswap._fast"]
if wanted("PYSWAP_DEBUG"):
    extensions.append(
        extension(
            "pyswap._fast_debug", "pyswap/_fast_debug.pyx", "pyswap/_fast.pyx", PYSWAP_DEBUG="1"
        )
    )

# Two large modules take most of the time: they are made at once.
AT_ONCE = os.cpu_count() or 1

setup(
    ext_modules=cythonize(extensions, compiler_directives=DIRECTIVES, nthreads=AT_ONCE),
    options={"build_ext": {"parallel": AT_ONCE}},
)
