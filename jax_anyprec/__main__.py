"""The ``jax-anyprec`` command; `cli` holds it, this file says how to get what it needs."""

from __future__ import annotations

import sys

_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line, or say which packages it lacks."""
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        print(
            f'jax-anyprec needs the package {error.name}: pip install "jax-anyprec[demo]"',
            file=sys.stderr,
        )
        sys.exit(1)
    cli(prog_name="jax-anyprec")


if __name__ == "__main__":
    main()
