"""Flax transformers and their weight maps, on the layers of jax_anyprec."""

from jax_anyprec.quantization import Quantization

from .generate import generate
from .llama import Cache, Llama, LlamaConfig
from .llama_gguf import LoadedModel, WeightBytes, load_gguf, weight_bytes
from .projections import Projections, merge_projections
from .tokenizer import Tokenizer

__all__ = [
    "Cache",
    "Llama",
    "LlamaConfig",
    "LoadedModel",
    "Projections",
    "Quantization",
    "Tokenizer",
    "WeightBytes",
    "generate",
    "load_gguf",
    "merge_projections",
    "weight_bytes",
]
