"""A block: residual branch around a mixer, residual branch around an FFN."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from archsearch.modules.norm import RMSNorm


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); either branch may be missing.

    norm_place: `pre` norms a branch's input, `post` its output (OLMo 2), `sandwich` both (Gemma 2).
    residual_scale multiplies what a branch adds. `shares_kv`: this block's keys and values go to or come from another.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module | None,
        ffn: nn.Module | None,
        norm: str = "rmsnorm",
        norm_place: str = "pre",
        residual_scale: float = 1.0,
        shares_kv: bool = False,
    ) -> None:
        super().__init__()
        self.mixer: Any = mixer
        self.ffn: Any = ffn
        self.residual_scale = residual_scale
        self.shares_kv = shares_kv
        before, after = norm_place in ("pre", "sandwich"), norm_place in ("post", "sandwich")
        if mixer is not None:
            self.mixer_norm = make_norm(norm, d_model) if before else nn.Identity()
            self.mixer_post_norm = make_norm(norm, d_model) if after else nn.Identity()
        if ffn is not None:
            self.ffn_norm = make_norm(norm, d_model) if before else nn.Identity()
            self.ffn_post_norm = make_norm(norm, d_model) if after else nn.Identity()

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, kv: Any = None) -> tuple[Tensor, Any]:
        """x [B, T, D]; `kv`: keys and values of the block this one reads from. Returns x and the `kv` in use."""
        if self.mixer is not None:
            h = self.mixer_norm(x)
            if self.shares_kv:
                kv = self.mixer.make_kv(h) if kv is None else kv
                y = self.mixer.attend(h, kv, 0, seq_idx)
            else:
                y = self.mixer(h, seq_idx)
            x = self._add(x, y, self.mixer_post_norm)
        return self._ffn(x), kv

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int, kv: Any = None) -> tuple[Tensor, Any]:
        """T more tokens [B, T, D] after `position`; the state is updated in place."""
        if self.mixer is not None:
            h = self.mixer_norm(x)
            if self.shares_kv:
                kv = self.mixer.make_kv(h, state, position) if kv is None else kv
                y = self.mixer.attend(h, kv, position)
            elif x.shape[1] == 1:
                y = self.mixer.step(h, state, position)
            else:
                y = self.mixer.extend(h, state, position)
            x = self._add(x, y, self.mixer_post_norm)
        return self._ffn(x), kv

    def _ffn(self, x: Tensor) -> Tensor:
        if self.ffn is None:
            return x
        return self._add(x, self.ffn(self.ffn_norm(x)), self.ffn_post_norm)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        y = norm(y)  # under autocast in half precision, which the residual stream is not
        return x + y if self.residual_scale == 1.0 else x + self.residual_scale * y


def make_norm(kind: str, d_model: int) -> nn.Module:
    """RMSNorm (1910.07467) or LayerNorm without bias."""
    return RMSNorm(d_model, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(d_model, eps=1e-6, bias=False)
