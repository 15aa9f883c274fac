"""The language model as an exported file ends with it; the exporter writes the constants and `make_blocks` anew.

It mirrors `archsearch.model.HybridLM` (same names of parameters, same arithmetic, same initial values), and every
export compares the two before it is kept. Options that a model does not use are folded away with everybody else's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsearch.modules.block import Block, make_norm

VOCAB_SIZE = 256
D_MODEL = 256
N_BLOCKS = 1
EMBED_STD = 0.02  # of the initial embedding, whose output is scaled back to unit variance
LOGIT_SCALE = 1.0  # 256 / d_model: the size of the logits does not depend on the width (2203.03466)
NORM = "rmsnorm"
TIE_EMBEDDINGS = True
SHARES_KV = False
KV_FROM: dict[int, int] = {}  # block -> the earlier block whose keys and values it uses
HAS_BIASES = True  # some nn.Linear has a bias
HAS_OWN_INIT = True  # some module has a reset_parameters


def make_blocks() -> list[Block]:
    """The blocks, first to last."""
    raise AssertionError("the exporter writes this function for each model")


@dataclass
class State:
    """Caches and recurrent states of every block, and how many tokens they hold."""

    blocks: list[dict[str, Tensor]]
    position: int = 0


class HybridLM(nn.Module):
    """The language model: embedding, blocks, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.blocks: Any = nn.ModuleList(make_blocks())
        self.norm = make_norm(NORM, D_MODEL)
        self.head = nn.Linear(D_MODEL, VOCAB_SIZE, bias=False)
        if TIE_EMBEDDINGS:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]."""
        x = self.embed(tokens) * (1 / EMBED_STD)
        if SHARES_KV:
            kvs: dict[int, Any] = {}
            for i, block in enumerate(self.blocks):
                x, kvs[i] = block(x, kv=kvs[KV_FROM[i]] if i in KV_FROM else None)
        else:
            for block in self.blocks:
                x, _ = block(x)
        return self._logits(x)

    def init_state(self, batch: int, context: int) -> State:
        """An empty state for `batch` sequences of up to `context` tokens."""
        weight = self.embed.weight
        states: list[dict[str, Tensor]] = []
        for block in self.blocks:
            if block.mixer is None:
                states.append({})
            else:
                states.append(block.mixer.init_state(batch, context, weight.device, weight.dtype))
        return State(states)

    def extend(self, tokens: Tensor, state: State, last_only: bool = False) -> Tensor:
        """Logits [B, T, vocab] of T more tokens after those in `state`, which is updated: prefill and decoding.

        `last_only`: logits [B, 1, vocab] of the last token, which is all that a prompt is read for.
        """
        x = self.embed(tokens) * (1 / EMBED_STD)
        if SHARES_KV:
            kvs: dict[int, Any] = {}
            for i, block in enumerate(self.blocks):
                kv = kvs[KV_FROM[i]] if i in KV_FROM else None
                x, kvs[i] = block.extend(x, state.blocks[i], state.position, kv=kv)
        else:
            for block, block_state in zip(self.blocks, state.blocks, strict=True):
                x, _ = block.extend(x, block_state, state.position)
        state.position += tokens.shape[1]
        return self._logits(x[:, -1:] if last_only else x)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x)) if LOGIT_SCALE == 1.0 else self.head(self.norm(x)) * LOGIT_SCALE
        return logits

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None
    ) -> Tensor:
        """Tokens [B, T + max_new_tokens]: the prompt [B, T] and what follows it; temperature 0 takes the likeliest."""
        state = self.init_state(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        new = tokens
        for _ in range(max_new_tokens):
            logits = self.extend(new, state, last_only=True)[:, -1].float()
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def balance_loss(self) -> Tensor:
        """What the experts' routers add to the training loss, after a forward in training mode."""
        losses: list[Any] = [getattr(module, "router_loss", None) for module in self.modules()]
        return torch.stack([loss for loss in losses if loss is not None]).sum()

    def update_router_bias(self) -> None:
        """Once after each optimiser step of a training: favour the experts that got few tokens."""
        for module in self.modules():
            update = getattr(module, "update_bias", None)
            if update is not None:
                update()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights for training from scratch: N(0, 1 / d_in) for matrices, N(0, 0.02^2) for the embedding."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if HAS_BIASES and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "normalized_shape"):  # a norm
                nn.init.ones_(module.get_parameter("weight"))
        if HAS_OWN_INIT:
            for module in reversed(list(self.modules())):  # children first, so that a parent has the last word
                reset = getattr(module, "reset_parameters", None)
                if reset is not None and not isinstance(module, nn.Linear | nn.Embedding):
                    reset()
        nn.init.normal_(self.embed.weight, std=EMBED_STD)
        if not TIE_EMBEDDINGS:
            nn.init.normal_(self.head.weight, std=EMBED_STD)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> HybridLM:
        """The model with the weights in `folder` (needs the safetensors package)."""
        from safetensors.torch import load_model

        config = json.loads((Path(folder) / "config.json").read_text())
        model = cls().to(device=device, dtype=getattr(torch, config["dtype"]))
        load_model(model, Path(folder) / "model.safetensors", device=device)
        return model.eval()


def main_bytes() -> None:
    """Go on from a text: `python model.py "import "`."""
    text = sys.argv[1] if len(sys.argv) > 1 else "import "
    model = HybridLM.from_pretrained(Path(__file__).parent)
    tokens = torch.tensor([list(text.encode())])
    new = model.generate(tokens, max_new_tokens=200, temperature=0.8)[0, tokens.shape[1] :].tolist()
    print(text + bytes(token for token in new if token < 256).decode(errors="replace"))


def main_ids() -> None:
    """Go on from token ids: `python model.py 1 2 3`."""
    model = HybridLM.from_pretrained(Path(__file__).parent)
    tokens = torch.tensor([[int(word) for word in sys.argv[1:] or ["0"]]])
    print(*model.generate(tokens, max_new_tokens=50, temperature=0.8)[0].tolist())
