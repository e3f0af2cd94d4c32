"""Found first by every Python that a program under `python -m pyswap run` starts.

It has the process attach to the program's pool when NumPy is imported: what needs no arrays starts
as fast as before. A `sitecustomize` that was there before is run too.
"""

import importlib.machinery
import importlib.util
import os
import sys


class AfterNumPy:
    """A finder that lets NumPy be found as ever, and does something once it is loaded.

    pyswap imports NumPy, in the middle of its own modules, which joining needs: so NumPy is loaded
    before the first of them.
    """

    def __init__(self):
        """Wait for both."""
        self.waiting = {"numpy", "pyswap"}

    def find_spec(self, name, path=None, target=None):
        """Find NumPy and pyswap, once each, and nothing else."""
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_go_on(module):
            load(module)
            if name == "pyswap":
                importlib.import_module("numpy")
            else:
                sys.meta_path.remove(self)
                self.waiting.clear()
                importlib.import_module("pyswap.run").join()

        spec.loader.exec_module = load_and_go_on
        return spec


def run_the_other():
    """Run the `sitecustomize` that this one hides, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [folder for folder in sys.path if os.path.abspath(folder or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "PYSWAP_RUN" in os.environ:
    sys.meta_path.insert(0, AfterNumPy())
run_the_other()
