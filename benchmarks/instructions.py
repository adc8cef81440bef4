"""Instructions that each kernel executes on a fixed case, which show a slower one without a clock.

    python -m benchmarks.instructions            # count, and compare with the recorded counts
    python -m benchmarks.instructions --record   # write them down

Needs valgrind (its tool callgrind counts), cmake and a compiler. valgrind knows no AVX-512 and no
AVX-VNNI; their kernels are the same source over other vector operations. Counts depend on the
compiler, so those of another one are shown and not compared.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from .report import table

ROOT = pathlib.Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "instructions.json"
ISAS = ("avx2", "portable")
TOLERANCE = 0.02
"""A kernel that executes so much more than recorded is an error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(pathlib.Path(folder))
        compiler = compiler_of(pathlib.Path(folder))
        cases = run(str(program)).stdout.splitlines()
        counts = {isa: {case: count(program, isa, case) for case in cases} for isa in ISAS}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"counts": {}}
    rows = [
        (isa, case, n, recorded["counts"].get(isa, {}).get(case))
        for isa, by_case in counts.items()
        for case, n in by_case.items()
    ]
    header = ["instruction set", "case", "instructions", "recorded", "more than recorded"]
    print(table(header, ([*row, f"{change(*row[2:]):+.1%}"] for row in rows)))
    if options.record:
        RECORD.write_text(json.dumps({"compiler": compiler, "counts": counts}, indent=1) + "\n")
    elif recorded.get("compiler") != compiler:
        print(f"Not compared: recorded with {recorded.get('compiler')}, this is {compiler}")
    elif any(change(*row[2:]) > TOLERANCE for row in rows):
        sys.exit(f"A kernel executes over {TOLERANCE:.0%} more instructions than recorded")


def build(folder: pathlib.Path) -> pathlib.Path:
    """Compile the program that runs one case."""
    switches = ("-DJAX_ANYPREC_PYTHON=OFF", "-DJAX_ANYPREC_TESTS=ON")
    run("cmake", "-S", str(ROOT), "-B", str(folder), *switches)
    run("cmake", "--build", str(folder), "--target", "instruction_count", "--parallel")
    return folder / "instruction_count"


def compiler_of(folder: pathlib.Path) -> str:
    cache = (folder / "CMakeCache.txt").read_text()
    path = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    assert path, "cmake names no compiler"
    return run(path[1], "--version").stdout.splitlines()[0]


def count(program: pathlib.Path, isa: str, case: str) -> int:
    """Instructions of one case, without setting it up."""
    options = ("--tool=callgrind", "--toggle-collect=measured", "--callgrind-out-file=/dev/null")
    found = re.search(
        r"Collected : (\d+)", run("valgrind", *options, str(program), isa, case).stderr
    )
    assert found, "valgrind tells no count"
    return int(found[1])


def change(now: int, recorded: int | None) -> float:
    return now / recorded - 1 if recorded else 0.0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """The finished command; the end of this program if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} gave {done.returncode}\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    main()
