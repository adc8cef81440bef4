"""Flax transformers and their weight maps, on the layers of jax_anyprec."""

from jax_anyprec.quantization import Quantization

from .architectures import load_huggingface
from .export import export_huggingface
from .generate import generate
from .huggingface import HuggingFaceError
from .huggingface_packed import load_packed
from .llama import Cache, Llama, LlamaConfig
from .llama_gguf import load_gguf
from .loading import LoadedModel, WeightBytes, weight_bytes
from .projections import Projections, merge_projections
from .tokenizer import Tokenizer

__all__ = [
    "Cache",
    "HuggingFaceError",
    "Llama",
    "LlamaConfig",
    "LoadedModel",
    "Projections",
    "Quantization",
    "Tokenizer",
    "WeightBytes",
    "export_huggingface",
    "generate",
    "load_gguf",
    "load_huggingface",
    "load_packed",
    "merge_projections",
    "weight_bytes",
]
