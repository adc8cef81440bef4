"""Generate text with a model whose layers are shared by several devices, of several processes.

    python examples/tensor_parallel.py --devices 3           # three parts of one CPU
    python examples/tensor_parallel.py --processes 3         # three local processes, to try it
    srun python examples/tensor_parallel.py --cluster        # a process a node or GPU

On a cluster the same program runs in every process; `jax.distributed.initialize` finds the others
(Slurm, Open MPI, Kubernetes and TPU pods need no arguments; else give it the coordinator's address,
the number of processes and the number of this one).
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import jax_anyprec as ap
from jax_anyprec import fetch
from jax_anyprec.models import generate, load_gguf

# Sums over devices round in another order than on one, and rounding activations to 8 bits would
# make more of that: the text may differ then, though the model is as good.
FLOAT_ACTIVATIONS = ap.Quantization(activations=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, join the other processes, and print the text in the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=20)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", type=int, default=1, help="parts that a CPU is taken as")
    where.add_argument("--processes", type=int, help="local processes to start")
    where.add_argument("--cluster", action="store_true", help="join the processes of a cluster")
    where.add_argument("--join", metavar="ADDRESS,COUNT,NUMBER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    model = options.model or fetch.fetch("smollm2")
    if options.processes:
        start(options.processes, ["--model", model, "--tokens", options.tokens], options.prompt)
        return
    if options.join:
        address, count, number = options.join.split(",")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(number))
    elif options.cluster:
        jax.distributed.initialize()
    else:
        jax.config.update("jax_num_cpu_devices", options.devices)
    text = complete(model, options.prompt, options.tokens)
    if jax.process_index() == 0:
        print(text)


def complete(path: Path, prompt: str, tokens: int) -> str:
    """The text that the model of a file continues `prompt` with, computed by all devices."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=auto)
    loaded = load_gguf(path, quantization=FLOAT_ACTIVATIONS, mesh=mesh)
    ids = loaded.tokenizer.encode(prompt)
    answer = generate(
        loaded.model, ids, max_tokens=tokens, stop_tokens=loaded.tokenizer.stop_tokens
    )
    return loaded.tokenizer.decode(list(answer))


def start(count: int, arguments: Sequence[object], prompt: str) -> None:
    """Run this program in `count` processes; if one of them fails, stop the others and raise."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *map(str, arguments)]
    processes = [
        subprocess.Popen([*command, "--join", f"{address},{count},{number}", "--", prompt])
        for number in range(count)
    ]
    try:
        while any(process.poll() is None for process in processes):
            failed = [n for n, process in enumerate(processes) if process.poll()]
            if failed:
                raise SystemExit(f"processes {failed} of {count} failed")
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")


if __name__ == "__main__":
    main()
