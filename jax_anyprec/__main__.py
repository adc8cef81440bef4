"""The ``jax-anyprec`` command; `cli` holds it, this file says how to get what it needs."""

from __future__ import annotations

import sys

_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line, or say which packages it lacks."""
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        print(
            f'jax-anyprec needs the package {package}: pip install "jax-anyprec[demo]"',
            file=sys.stderr,
        )
        sys.exit(1)
    cli(prog_name="jax-anyprec")


if __name__ == "__main__":
    main()
