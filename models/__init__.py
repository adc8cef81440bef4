"""Flax transformers and their weight maps, on the layers of jax_anyprec."""

from jax_anyprec.quantization import Quantization

from .architectures import load_huggingface
from .bert import Bert, BertConfig
from .export import export_huggingface
from .generate import generate
from .gpt2 import GPT2, GPT2Config
from .huggingface import HuggingFaceError
from .huggingface_packed import load_packed
from .llama import Cache, Llama, LlamaConfig
from .llama_gguf import load_gguf, pack_embedding
from .loading import LoadedModel, WeightBytes, weight_bytes
from .projections import Projections, merge_projections
from .sentences import SentenceEncoder, load_sentence_encoder
from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "Bert",
    "BertConfig",
    "Cache",
    "GPT2Config",
    "HuggingFaceError",
    "Llama",
    "LlamaConfig",
    "LoadedModel",
    "Projections",
    "Quantization",
    "SentenceEncoder",
    "Tokenizer",
    "WeightBytes",
    "export_huggingface",
    "generate",
    "load_gguf",
    "load_huggingface",
    "load_packed",
    "load_sentence_encoder",
    "merge_projections",
    "pack_embedding",
    "weight_bytes",
]
