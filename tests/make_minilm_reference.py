"""Make tests/data/minilm.npz: sentences, and what Transformers and PyTorch make of them.

    pip install transformers torch safetensors tokenizers
    python tests/make_minilm_reference.py FOLDER           # write it
    python tests/make_minilm_reference.py FOLDER --check   # compare what is there with PyTorch

FOLDER is the checkpoint: what ``jax-anyprec fetch minilm`` prints. Embeddings are made as its
authors say (README.md of sentence-transformers/all-MiniLM-L6-v2): the mean of the last layer's
features over the tokens that are no padding, divided by its length, of at most 256 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

FILE = Path(__file__).parent / "data" / "minilm.npz"

SENTENCES = [
    "The Eiffel Tower was the tallest structure in the world for forty-one years.",
    "For four decades nothing that people had built was higher than the tower in Paris.",
    "Water boils at a lower temperature on top of a mountain than at the sea.",
    "The committee will meet again on Thursday to discuss next year's budget.",
    "She plays the violin, but her brother prefers the drums.",
    "Why did the chicken cross the road?",
    "Stop!",
    "No.",
    "A stitch in time saves nine.",
    "In 1969, Apollo 11 carried three astronauts 384,400 km to the Moon; two of them walked on it.",
    "Crème brûlée and naïve façades: words that English took from French, accents and all.",
    "Der Zug nach München fährt heute von Gleis 7 ab.",
    "def add(a, b): return a + b  # Python",
    "Contact us at info@example.org or visit https://www.example.org/about?page=2.",
    "Antidisestablishmentarianism is longer than most words, floccinaucinihilipilification too.",
    "The stock fell 3.7% after the company cut its forecast for the third quarter.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen, using light.",
    "Plants make sugar from air and water when the sun shines.",
    "東京は日本の首都です。",
    "It was raining, and the match was called off; nobody minded much, since both teams were "
    "tired, the pitch was under water, and the last bus home would have left before the end.",
    # Cut at 256 tokens.
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. " * 20,
]

MAX_TOKENS = 256


def embed(folder: str) -> np.ndarray:
    """``float32[sentences, 384]``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(
        SENTENCES, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        features = model(**batch).last_hidden_state
    shown = batch["attention_mask"][..., None]
    mean = (features * shown).sum(1) / shown.sum(1)
    return torch.nn.functional.normalize(mean).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    embeddings = embed(options.folder)
    if not options.check:
        np.savez_compressed(FILE, sentences=SENTENCES, embeddings=embeddings)
    stored = np.load(FILE)
    if stored["sentences"].tolist() != SENTENCES:
        raise SystemExit("the stored sentences are not those of this script")
    distance = 1 - (stored["embeddings"] * embeddings).sum(-1).min()
    print(f"{len(SENTENCES)} sentences, largest cosine distance {distance:.1e}")
    if distance > 1e-6:
        raise SystemExit("the stored embeddings are not those of this checkpoint")


if __name__ == "__main__":
    main()
