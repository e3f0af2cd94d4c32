"""The compiled helpers: built into a folder when the bench starts, loaded by every run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

__all__ = ["build", "load"]

_ROOT = Path(__file__).resolve().parent.parent
_NAME = "_limits"


def build(folder: Path) -> str:
    """Compile the helpers into `folder`.

    Returns
    -------
    str
        The file to `load`.

    Raises
    ------
    RuntimeError
        If Cython or a C compiler is missing, or fails; with what it said.
    """
    made, target = folder / f"{_NAME}.c", folder / f"{_NAME}.so"
    source = str(Path(__file__).with_name(f"{_NAME}.pyx"))
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    include = sysconfig.get_path("include")
    options = ["-O2", "-std=gnu11", "-shared", "-fPIC", f"-I{include}"]
    cython = [sys.executable, "-m", "cython", "-3", "-Xcdivision=True", "-I", str(_ROOT)]
    for command in (
        [*cython, "-o", str(made), source],
        [*compiler, *options, "-o", str(target), str(made)],
    ):
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
        except OSError as error:
            raise RuntimeError(f"{command[0]}: {error.strerror}") from error
        if told.returncode != 0:
            said = (told.stderr or told.stdout).strip().splitlines()
            raise RuntimeError(f"{' '.join(command[:3])}: {said[-1] if said else 'failed'}")
    return str(target)


def load(path: str) -> ModuleType:
    """Load what `build` returned.

    Raises
    ------
    ImportError
        If nothing was built.
    """
    if not path:
        raise ImportError("the compiled helpers of the bench were not built")
    loader = importlib.machinery.ExtensionFileLoader(_NAME, path)
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
