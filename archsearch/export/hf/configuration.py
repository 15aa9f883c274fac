"""The configuration of an exported model; the exporter writes the defaults of each model in their place."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

HIDDEN_SIZE = 256
LAYER_TYPES = ("full_attention",)


class HybridConfig(PreTrainedConfig):
    """Sizes of the one layout that the code beside it is written for; only the vocabulary may be changed."""

    model_type = "hybrid"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = HIDDEN_SIZE
    num_hidden_layers: int = len(LAYER_TYPES)
    max_position_embeddings: int = 256
    layer_types: list[str] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = list(LAYER_TYPES)
        layout = (self.hidden_size, self.num_hidden_layers, self.layer_types)
        expected = (HIDDEN_SIZE, len(LAYER_TYPES), list(LAYER_TYPES))
        if layout != expected:
            raise ValueError(f"hidden_size, num_hidden_layers, layer_types are {layout}; the code is for {expected}")
        super().__post_init__(**kwargs)
