"""Make the tiny random GPT-2 and BERT of tests/data/huggingface and what Transformers says of them.

    pip install transformers torch safetensors
    python tests/make_gpt2_bert.py            # write them
    python tests/make_gpt2_bert.py --check    # compare those that are there with Transformers

Each folder has a model that Transformers made and saved, and reference.npz with inputs and what
PyTorch computes from them in float32.
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

GPT2 = transformers.GPT2Config(
    vocab_size=96,
    n_positions=40,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_inner=64,
    bos_token_id=0,
    eos_token_id=1,
)
BERT = transformers.BertConfig(
    vocab_size=96,
    max_position_embeddings=24,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)


def inputs(name: str) -> dict[str, np.ndarray]:
    """What the model reads, by the names of the arguments in Transformers."""
    random = np.random.default_rng(0)
    if name == "gpt2":
        return {"input_ids": random.integers(2, GPT2.vocab_size, (2, 24))}
    shape = (3, 12)
    return {
        "input_ids": random.integers(2, BERT.vocab_size, shape),
        "token_type_ids": random.integers(0, 2, shape),
        "attention_mask": (np.arange(shape[1]) < np.array([[12], [7], [1]])).astype(np.int64),
    }


def make_model(name: str) -> Any:
    """A random model in float32, without a bias of 0 or a norm of 1."""
    model = transformers.GPT2LMHeadModel(GPT2) if name == "gpt2" else transformers.BertModel(BERT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def load_model(name: str) -> Any:
    kind = transformers.GPT2LMHeadModel if name == "gpt2" else transformers.BertModel
    return kind.from_pretrained(DATA / name, attn_implementation="eager", dtype=torch.float32)


def outputs(name: str, model: Any) -> dict[str, np.ndarray]:
    """What the model says, by the names of the results in Transformers."""
    wanted = ["logits"] if name == "gpt2" else ["last_hidden_state", "pooler_output"]
    with torch.no_grad():
        result = model.eval()(**{k: torch.from_numpy(v) for k, v in inputs(name).items()})
    return {key: result[key].numpy() for key in wanted}


def write(name: str) -> None:
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    make_model(name).save_pretrained(folder)
    np.savez_compressed(folder / "reference.npz", **inputs(name), **outputs(name, load_model(name)))


def check(name: str) -> float:
    """The largest difference of what is stored from what is computed now."""
    stored = np.load(DATA / name / "reference.npz")
    computed = outputs(name, load_model(name))
    return max(float(np.abs(stored[key] - value).max()) for key, value in computed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    for name in ("gpt2", "bert"):
        if not options.check:
            write(name)
        difference = check(name)
        print(f"{name}: largest difference {difference:.1e}")
        if difference > 1e-5:
            raise SystemExit(f"{name}: what is stored is not what its weights give")


if __name__ == "__main__":
    main()
