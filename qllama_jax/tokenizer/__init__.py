"""Text <-> token ids, from a GGUF file's own vocabulary."""

from qllama_jax.tokenizer.stream_decoder import StreamDecoder as StreamDecoder
from qllama_jax.tokenizer.tokenizer import Tokenizer as Tokenizer
