"""Quantized Llama models as pure JAX: GGUF files stay packed on the device.

`load` a file, `generate` or `stream` text; or take `model.params` and `model.config` to the pure
functions `forward`, `hidden_states`, `unembed` and `generate_tokens`.
"""

from qllama_jax.cache import KVCache, init_cache, resize_cache
from qllama_jax.chat_template import ChatTemplateError
from qllama_jax.config import ModelConfig
from qllama_jax.decoding import (
    Chosen,
    DecodeState,
    Finish,
    decode_many,
    prefill,
    start_decoding,
)
from qllama_jax.decoding_arguments import row_keys
from qllama_jax.errors import (
    ContextOverflowError,
    GGUFError,
    NumericalError,
    OutOfMemoryError,
)
from qllama_jax.generate import Piece, Result, generate, stream
from qllama_jax.generate_tokens import Decoded, generate_tokens
from qllama_jax.gguf_file import read_gguf
from qllama_jax.load import Model, load
from qllama_jax.matmul import matmul
from qllama_jax.model import embed, forward, hidden_states, sites, unembed
from qllama_jax.model_file import read_model_file
from qllama_jax.params import Params
from qllama_jax.penalties import recent_tokens
from qllama_jax.quants import Block
from qllama_jax.sampling import Sampling
from qllama_jax.score import Perplexity, Score, perplexity, score, token_logprobs
from qllama_jax.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Block",
    "ChatTemplateError",
    "Chosen",
    "ContextOverflowError",
    "DecodeState",
    "Decoded",
    "Finish",
    "GGUFError",
    "KVCache",
    "Model",
    "ModelConfig",
    "NumericalError",
    "OutOfMemoryError",
    "Params",
    "Perplexity",
    "Piece",
    "Result",
    "Sampling",
    "Score",
    "Tokenizer",
    "decode_many",
    "embed",
    "forward",
    "generate",
    "generate_tokens",
    "hidden_states",
    "init_cache",
    "load",
    "matmul",
    "perplexity",
    "prefill",
    "read_gguf",
    "read_model_file",
    "recent_tokens",
    "resize_cache",
    "row_keys",
    "score",
    "sites",
    "start_decoding",
    "stream",
    "token_logprobs",
    "unembed",
]
