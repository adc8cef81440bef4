"""Make the tiny random checkpoints of tests/data/huggingface and what Transformers says of them.

    pip install transformers torch
    python tests/make_huggingface.py            # write them
    python tests/make_huggingface.py --check    # compare those that are there with Transformers

Each folder has a model that Transformers made and saved, and reference.npz with tokens and the
logits that PyTorch computes from them in float32, whatever dtype the weights are in. Nothing that a
model does is left out by chance: windows are shorter than the text, soft caps bite, and biases and
norms are not 0 and 1.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

DATA = Path(__file__).parent / "data" / "huggingface"
TOKENS = np.random.default_rng(0).integers(3, 128, (2, 16))

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
THETA = {"rope_type": "default", "rope_theta": 1000.0}
GEMMA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "head_dim": 12,
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "final_logit_softcapping": 2.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# Name of the folder -> configuration class, what is not COMMON, and with "dtype" that of the file.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"num_hidden_layers": 2, "rope_parameters": THETA, "dtype": "float32"},
    ),
    "llama-tied-llama3-rope": (
        "LlamaConfig",
        {
            "num_hidden_layers": 2,
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": (
        "MistralConfig",
        {
            "num_hidden_layers": 2,
            "head_dim": 12,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            "dtype": "float16",
        },
    ),
    "qwen2": (
        "Qwen2Config",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": THETA,
        },
    ),
    "qwen3": (
        "Qwen3Config",
        {
            "num_hidden_layers": 2,
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": THETA,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        GEMMA | {"rope_parameters": THETA, "attn_logit_softcapping": 1.5},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def make_model(name: str) -> Any:
    """A random model, in the dtype of its file."""
    kind, options = CHECKPOINTS[name]
    config = getattr(transformers, kind)(**COMMON | {"dtype": "bfloat16"} | options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def reference(folder: Path) -> np.ndarray:
    """Logits ``float32[B, S, vocab]`` of the model in a folder, for `TOKENS`."""
    # Eager attention is the one that has soft caps.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()


def write(name: str) -> None:
    """Make a folder anew."""
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    make_model(name).save_pretrained(folder)
    np.savez_compressed(folder / "reference.npz", tokens=TOKENS, logits=reference(folder))


def difference(name: str) -> float:
    """The largest difference of the logits that are stored from those that are computed now."""
    stored = np.load(DATA / name / "reference.npz")
    assert (stored["tokens"] == TOKENS).all()
    return float(np.abs(reference(DATA / name) - stored["logits"]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for name in CHECKPOINTS:
        if not options.check:
            write(name)
        largest = difference(name)
        print(f"{name}: largest difference {largest:.1e}")
        if largest > 1e-5:
            raise SystemExit(f"{name}: the stored logits are not those of its weights")


if __name__ == "__main__":
    main()
