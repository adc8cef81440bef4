"""What a reader must know of a GPU and of a run to judge its figures."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

from ..machine import commit

FIELDS = (
    *("name", "driver_version", "compute_cap"),
    *("clocks.max.sm", "power.limit", "temperature.gpu"),
)


def provenance(module: str) -> dict[str, str]:
    """How a file came about. COMMIT names the commit of a copy without git."""
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or commit(),
    }


def gpu() -> dict[str, str]:
    """The first GPU as its driver describes it.

    Raises:
      FileNotFoundError: there is no nvidia-smi, so no driver.
      subprocess.CalledProcessError: the driver finds no GPU.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return dict(zip(FIELDS, (part.strip() for part in answer.split(",")), strict=True))
