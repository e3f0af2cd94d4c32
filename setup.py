"""Build the extension modules; everything else about the project is in pyproject.toml.

Environment
-----------
PYSWAP_DEBUG=1   also build ``pyswap._fast_debug``: failpoints, counters and assertions.
PYSWAP_WERROR=1  a warning of the C compiler is an error.
"""

import os
from glob import glob

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

# Every header of the machinery: all are compiled into the one extension.
DEPENDS = sorted(glob("pyswap/core/*.pxd") + glob("pyswap/core/*.h") + glob("pyswap/*.pxd"))


def wanted(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def extension(name: str, source: str, *includes: str, **macros: str) -> Extension:
    return Extension(
        name,
        [source],
        depends=[*DEPENDS, *includes],
        define_macros=sorted(macros.items()),
        extra_compile_args=C_FLAGS + ["-Werror"] * wanted("PYSWAP_WERROR"),
    )


extensions = [extension("pyswap._fast", "pyswap/_fast.pyx")]
if wanted("PYSWAP_DEBUG"):
    extensions.append(
        extension(
            "pyswap._fast_debug", "pyswap/_fast_debug.pyx", "pyswap/_fast.pyx", PYSWAP_DEBUG="1"
        )
    )

setup(ext_modules=cythonize(extensions, compiler_directives=DIRECTIVES))
