"""`python -m pyswap`: the command line, where its packages are installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say in one sentence what it needs."""
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(
            f"python -m pyswap needs the package {error.name}: pip install 'pyswap-runtime[cli]'"
        )
    cli(prog_name="python -m pyswap")


if __name__ == "__main__":
    main()
