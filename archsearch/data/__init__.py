"""Text to batches: corpora, tokenizers, the packed cache, and windows that are the same for every trial."""

from archsearch.data.batches import Batch, Corpus, bits_per_byte
from archsearch.data.pack import held_out_tokens, holds_tokens, open_corpus, pack, tokenizer_json, vocab_size

__all__ = [
    "Batch",
    "Corpus",
    "bits_per_byte",
    "held_out_tokens",
    "holds_tokens",
    "open_corpus",
    "pack",
    "tokenizer_json",
    "vocab_size",
]
