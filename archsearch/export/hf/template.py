"""The language model as a Hugging Face folder has it; the exporter writes the constants and `make_blocks` anew.

It mirrors `archsearch.model.HybridLM` (same arithmetic, same initial values, parameters by transformers' names), and
every export compares the two before it is kept. Options that a model does not use are folded away with the others.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.initialization import normal_, ones_, zeros_
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from archsearch.export.hf.configuration import HybridConfig
from archsearch.modules.block import make_norm

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
HAS_ROUTER_LOSS = True  # some router adds to the training loss


class HybridCache(Cache):
    """What the model remembers of the tokens so far: a dict of tensors for each block.

    Whatever the block's mixer keeps: keys and values, recurrent states, the last inputs of short convolutions. `room`:
    tokens that keys and values have room for; it grows when more come.
    """

    is_compileable = False  # its tensors change their shapes

    def __init__(self, room: int = 0) -> None:
        super().__init__(layers=[])
        self.room = room
        self.position = 0  # tokens so far
        self.states: dict[int, dict[str, Tensor]] = {}  # by block
        self.rooms: dict[int, int] = {}
        self.padding: Tensor | None = None  # [B] how many of each row's tokens are padding in front
        self.groups: list[tuple[int, Tensor]] = []  # lengths of padding, and the rows that have them

    def state(self, layer_idx: int, mixer: Any, x: Tensor) -> dict[str, Tensor]:
        """The state of one block with room for the tokens of x [B, T, D]."""
        needed = self.position + x.shape[1]
        old, room = self.states.get(layer_idx), self.rooms.get(layer_idx, 0)
        if old is None or needed > room:
            room = max(self.room, needed if old is None else 2 * needed)
            new = mixer.init_state(x.shape[0], room, x.device, x.dtype)
            for name, tensor in (old or {}).items():
                new[name][tuple(slice(n) for n in tensor.shape)] = tensor
            self.states[layer_idx], self.rooms[layer_idx] = new, room
        return self.states[layer_idx]

    def set_padding(self, padding: Tensor | None) -> None:
        """Note how many tokens [B] in front of each row are padding."""
        self.padding, self.groups = None, []
        if padding is not None and padding.any():
            lengths: list[int] = torch.unique(padding).tolist()
            self.padding, self.groups = padding, [(n, (padding == n).nonzero()[:, 0]) for n in lengths]

    def is_past_padding(self) -> bool:
        """Whether all padding lies behind."""
        return self.position >= self.groups[-1][0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        for state in self.states.values():
            state.update({name: t.index_select(0, beam_idx.to(t.device)) for name, t in state.items()})
        if self.padding is not None:
            self.set_padding(self.padding.index_select(0, beam_idx.to(self.padding.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        sizes = [t.shape[0] for state in self.states.values() for t in state.values()]
        self.reorder_cache(torch.arange(sizes[0] if sizes else 0).repeat_interleave(repeats))

    def crop(self, *args: Any) -> None:
        """Refused: a recurrent state cannot forget its last tokens."""
        raise NotImplementedError("this cache holds recurrent states, which cannot be cropped")

    def reset(self) -> None:
        """Forget all tokens."""
        self.position, self.states, self.rooms, self.padding, self.groups = 0, {}, {}, None, []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases

    def __len__(self) -> int:
        return N_BLOCKS


def leading_zeros(mask: Tensor) -> Tensor:
    """[B] how many zeros each row of mask [B, T] begins with."""
    return (mask.cumsum(-1) == 0).sum(-1)


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + ffn(norm(x)); either branch may be missing.

    norm_place: `pre` norms a branch's input, `post` its output (OLMo 2), `sandwich` both (Gemma 2).
    residual_scale multiplies what a branch adds. `shares_kv`: this block's keys and values go to or come from another.
    padding: whether rows with padding in front always run apart (`rows`), or in the prompt only (`recurrent`, for
    mixers that count no positions).
    """

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        mixer: nn.Module | None,
        ffn: nn.Module | None,
        norm: str = "rmsnorm",
        norm_place: str = "pre",
        residual_scale: float = 1.0,
        shares_kv: bool = False,
        padding: str = "rows",
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer: Any = mixer
        self.ffn: Any = ffn
        self.residual_scale = residual_scale
        self.shares_kv = shares_kv
        self.padding = padding
        before, after = norm_place in ("pre", "sandwich"), norm_place in ("post", "sandwich")
        if mixer is not None:
            self.mixer_norm = make_norm(norm, d_model) if before else nn.Identity()
            self.mixer_post_norm = make_norm(norm, d_model) if after else nn.Identity()
        if ffn is not None:
            self.ffn_norm = make_norm(norm, d_model) if before else nn.Identity()
            self.ffn_post_norm = make_norm(norm, d_model) if after else nn.Identity()

    def share(self, **modules: nn.Module) -> None:
        """Use modules of an earlier block, which alone owns (and saves) their weights."""
        for name, module in modules.items():
            del self._modules[name]
            self.__dict__[name] = module

    def forward(
        self,
        x: Tensor,
        kv: Any = None,
        seq_idx: Tensor | None = None,
        past_key_values: HybridCache | None = None,
    ) -> tuple[Tensor, Any]:
        """x [B, T, D]; `kv`: keys and values of the block this one reads from. Returns x and the `kv` in use.

        Without a cache `seq_idx` [B, T] numbers packed documents, and nothing crosses from one to the next; with one,
        the tokens follow those in it, and it is updated.
        """
        if self.mixer is not None:
            h = self.mixer_norm(x)
            if self.shares_kv:
                if past_key_values is not None:
                    y, kv = self._extend_sharing(h, kv, past_key_values)
                else:
                    kv = self.mixer.make_kv(h) if kv is None else kv
                    y = self.mixer.attend(h, kv, 0, seq_idx)
            elif past_key_values is not None:
                y = self._extend(h, past_key_values)
            else:
                y = self.mixer(h, seq_idx)
            x = self._add(x, y, self.mixer_post_norm)
        if self.ffn is not None:
            x = self._add(x, self.ffn(self.ffn_norm(x)), self.ffn_post_norm)
        return x, kv

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        y = norm(y)  # under autocast in half precision, which the residual stream is not
        return x + y if self.residual_scale == 1.0 else x + self.residual_scale * y

    def _extend(self, h: Tensor, cache: HybridCache) -> Tensor:
        """T more tokens h [B, T, D] of the mixer; those that are padding give 0."""
        state, T = cache.state(self.layer_idx, self.mixer, h), h.shape[1]
        if not cache.groups or (self.padding == "recurrent" and cache.is_past_padding()):
            return self._run(h, state, cache.position)
        y = torch.zeros_like(h)
        for padding, rows in cache.groups:  # each as if it began with its first real token
            first = max(padding - cache.position, 0)
            if first < T:
                own = {name: tensor[rows] for name, tensor in state.items()}
                y[rows, first:] = self._run(h[rows, first:], own, max(cache.position - padding, 0))
                for name, tensor in own.items():
                    state[name][rows] = tensor.to(state[name].dtype)
        return y

    def _run(self, h: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """T more tokens h [B, T, D] of the mixer after `position`; the state is updated in place."""
        return self.mixer.step(h, state, position) if h.shape[1] == 1 else self.mixer.extend(h, state, position)

    def _extend_sharing(self, h: Tensor, kv: Any, cache: HybridCache) -> tuple[Tensor, Any]:
        """`_extend` with keys and values of another block or for another block; with padding they are one a group."""
        state, T = cache.state(self.layer_idx, self.mixer, h), h.shape[1]
        if not cache.groups:
            kv = self.mixer.make_kv(h, state, cache.position) if kv is None else kv
            return self.mixer.attend(h, kv, cache.position), kv
        y = torch.zeros_like(h)
        kvs = dict(kv or {})
        for padding, rows in cache.groups:
            first, position = max(padding - cache.position, 0), max(cache.position - padding, 0)
            if first < T:
                own = {name: tensor[rows] for name, tensor in state.items()}
                if padding not in kvs:
                    kvs[padding] = self.mixer.make_kv(h[rows, first:], own, position)
                y[rows, first:] = self.mixer.attend(h[rows, first:], kvs[padding], position)
                for name, tensor in own.items():
                    state[name][rows] = tensor.to(state[name].dtype)
        return y, kvs


def make_blocks() -> list[Block]:
    """The blocks, first to last."""
    raise AssertionError("the exporter writes this function for each model")


class HybridPreTrainedModel(PreTrainedModel):
    """What the two models below have in common: how weights begin, and what transformers should know."""

    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # states of the past cannot be taken back, as assisted decoding would
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": Block}

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """N(0, 1 / d_in) for matrices, N(0, 0.02^2) for the embedding and the head."""
        if isinstance(module, nn.Linear):
            is_head = module is self.get_output_embeddings()
            normal_(module.weight, std=EMBED_STD if is_head else module.in_features**-0.5)
            if HAS_BIASES and module.bias is not None:
                zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            normal_(module.weight, std=EMBED_STD)
        elif hasattr(module, "normalized_shape"):  # a norm
            ones_(module.weight)
        elif HAS_OWN_INIT and hasattr(module, "reset_parameters"):  # the rest knows itself
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module.reset_parameters()
            for name in module._non_persistent_buffers_set:  # in no file
                zeros_(getattr(module, name))


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, D_MODEL)
        self.layers: Any = nn.ModuleList(make_blocks())
        self.norm = make_norm(NORM, D_MODEL)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final activations [B, T, D] of input_ids [B, T] or inputs_embeds [B, T, D].

        attention_mask [B, T] has zeros for padding, in front or behind; `seq_idx` [B, T] numbers packed documents,
        which position_ids that start at 0 again do too. Otherwise position_ids do not matter: positions are relative.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected input_ids or inputs_embeds, one of them")
        x = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds) * (1 / EMBED_STD)
        seen = 0 if past_key_values is None else past_key_values.position
        if attention_mask is not None and attention_mask.shape != (x.shape[0], seen + x.shape[1]):
            expected = f"[{x.shape[0]}, {seen + x.shape[1]}], zeros for padding"
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}; expected {expected}")
        is_training = self.training and torch.is_grad_enabled()
        if use_cache and past_key_values is None and seq_idx is None and not is_training:
            past_key_values = HybridCache()
        if past_key_values is not None and seq_idx is not None:
            raise ValueError("packed documents and a cache exclude each other; pass use_cache=False")
        if past_key_values is not None and (seen == 0 or (x.shape[1] > 1 and attention_mask is not None)):
            past_key_values.set_padding(None if attention_mask is None else leading_zeros(attention_mask))
        elif past_key_values is None and seq_idx is None and attention_mask is not None:
            padding = leading_zeros(attention_mask)[:, None]
            if padding.any():  # padding is a document of its own; what follows a text cannot reach it
                seq_idx = (torch.arange(x.shape[1], device=x.device) >= padding).long()
        elif past_key_values is None and seq_idx is None and position_ids is not None:
            starts = (position_ids == 0).expand(x.shape[0], -1)
            if starts[:, 1:].any():
                seq_idx = starts.cumsum(-1)
        if SHARES_KV:
            kvs: dict[int, Any] = {}
            for i, layer in enumerate(self.layers):
                kv = kvs[KV_FROM[i]] if i in KV_FROM else None
                x, kvs[i] = layer(x, kv, seq_idx=seq_idx, past_key_values=past_key_values)
        else:
            for layer in self.layers:
                x, _ = layer(x, seq_idx=seq_idx, past_key_values=past_key_values)
        if past_key_values is not None:
            past_key_values.position += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The language model: HybridModel and a head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(D_MODEL, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab] (of the last `logits_to_keep` tokens, 0: of all) and, with labels [B, T], the loss.

        labels are not shifted, -100 counts for nothing; the other arguments are as in HybridModel.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*inputs, use_cache=use_cache, seq_idx=seq_idx, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(h) if LOGIT_SCALE == 1.0 else self.lm_head(h) * LOGIT_SCALE
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if HAS_ROUTER_LOSS and self.training:
                loss = loss + self.balance_loss()
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states)

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

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Called by `generate`; the cache is always ours, whatever `cache_implementation` says."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridCache(room=max_cache_length)
