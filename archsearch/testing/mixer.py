"""The contract of token mixers: exact costs, causality, decode equal to the forward pass, isolated documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archsearch.architecture import Block, ModelSpec, parse_mixer
from archsearch.contract import MixerSpec, Site
from archsearch.ffns.none import NoFFN
from archsearch.model import build_model, num_params
from archsearch.testing.checks import EQUAL, EXACT, distance, is_near, multiply_flops, packed, pieces, seeded
from archsearch.testing.common import CONTEXT, Contract

LENGTHS = (1, 63, 100, 257)
CUTS = (0, 14, 15, 16, 62, 63, 64, 79)  # last unchanged token: both sides of the usual chunk boundaries
DOCUMENTS = ((1, 15, 48, 33), (40, 24, 33))  # lengths of the documents packed into each row


class MixerContract(Contract):
    """What every token mixer keeps to; list the `variants` to be tested."""

    def spec(self, variant: Any) -> MixerSpec:
        spec: MixerSpec = variant if isinstance(variant, MixerSpec) else parse_mixer(variant)
        return spec.at_context(CONTEXT)

    def model_spec(self, spec: MixerSpec, site: Site) -> ModelSpec:
        return ModelSpec(site.d_model, CONTEXT, 2, (Block(spec, NoFFN()),))

    def part(self, model: Any) -> Any:
        return model.blocks[0].mixer

    def inputs(self) -> list[tuple[Tensor, ...]]:
        return [(), (packed(DOCUMENTS),)]

    def test_num_params(self, variant: Any) -> None:
        spec = self.spec(variant)
        width = self.site(spec).d_model
        readers = (False, True) if spec.kv_format(Site(width)) is not None else (False,)
        for site in (Site(w, reads_kv=reads) for w in (width, 2 * width) for reads in readers):
            with torch.device("meta"):
                assert spec.num_params(site) == num_params(spec.call(site).build()), site

    def test_state_bytes(self, variant: Any) -> None:
        raw: MixerSpec = variant if isinstance(variant, MixerSpec) else parse_mixer(variant)
        for context in (5, 96):  # less than a window, and more
            spec = raw.at_context(context)
            site = self.site(spec)
            module: Any = spec.call(site).build()
            for dtype in (torch.float32, torch.bfloat16):
                state = module.init_state(1, context, torch.device("cpu"), dtype)
                held = sum(t.numel() * t.element_size() for t in state.values())
                assert spec.state_bytes(site, context, dtype.itemsize) == held, (context, dtype)

    def test_flops(self, variant: Any) -> None:
        """The formula holds all Linear layers and lies within a factor of 2 of the products that run.

        Masks let more pairs be computed than count, and the counter does not see element-wise recurrences; a forgotten
        term, head or factor 2 is farther off than that.
        """
        spec, site, module = self.make(variant)
        n, context = 128, 96
        state = module.init_state(1, context, torch.device("cpu"), torch.float32)
        x = seeded(1, n, site.d_model)
        ran, linear = multiply_flops(module, lambda: module(x))
        formula = spec.flops(site, n)
        assert linear <= formula <= 2 * ran, (linear, formula, ran)
        assert ran <= 2 * formula, (ran, formula)
        ran, linear = multiply_flops(module, lambda: module.step(x[:, :1], state, context - 1))
        formula = spec.step_flops(site, context)
        assert linear <= formula <= 2 * ran, (linear, formula, ran)
        assert ran <= 2 * formula, (ran, formula)
        counts = [spec.flops(site, tokens) for tokens in range(1, 200)]
        assert counts == sorted(set(counts)), "more tokens must cost more"
        counts = [spec.step_flops(site, tokens) for tokens in range(1, 200)]
        assert counts == sorted(counts), "more context must not cost less"

    def test_causality(self, variant: Any) -> None:
        """Other tokens after t, one row per t: nothing moves up to t, something does after it."""
        spec, site, module = self.make(variant)
        assert spec.causal
        x = seeded(1, 81, site.d_model).repeat(len(CUTS), 1, 1)
        y = module(x)
        for row, t in enumerate(CUTS):
            x[row, t + 1 :] = seeded(80 - t, site.d_model, seed=1 + row)
        changed = module(x)
        for row, t in enumerate(CUTS):
            assert distance(changed[row, : t + 1], y[row, : t + 1]) <= EXACT, f"token {t} sees token {t + 1} or later"
            assert distance(changed[row, t + 1], y[row, t + 1]) > EQUAL

    def test_decode_is_forward(self, variant: Any) -> None:
        """One pass == one long extend == random pieces == token by token."""
        _, site, module = self.make(variant)
        x = seeded(2, max(LENGTHS), site.d_model)
        with torch.no_grad():
            truth = self.extend(module, x, [1] * x.shape[1])
            for i, length in enumerate(LENGTHS):
                part = x[:, :length]
                assert distance(module(part), truth[:, :length]) <= EQUAL, f"forward of {length} tokens"
                assert distance(self.extend(module, part, [length]), truth[:, :length]) <= EQUAL, f"extend of {length}"
                for split in (pieces(length, 2 * i), pieces(length, 2 * i + 1)):
                    assert distance(self.extend(module, part, split), truth[:, :length]) <= EQUAL, f"pieces {split}"

    def extend(self, module: Any, x: Tensor, split: Sequence[int]) -> Tensor:
        """The outputs of x fed in pieces; single tokens go through `step`."""
        state = module.init_state(x.shape[0], x.shape[1], x.device, x.dtype)
        outputs, position = [], 0
        for n in split:
            more = x[:, position : position + n]
            outputs.append((module.step if n == 1 else module.extend)(more, state, position))
            position += n
        return torch.cat(outputs, dim=1)

    def test_decode_in_bfloat16(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        x = seeded(2, 70, site.d_model).bfloat16()
        with torch.no_grad():
            low = self.extend(module.bfloat16(), x, [40, *[1] * 30])
            assert low.dtype == torch.bfloat16
            assert is_near(low, module.float()(x.float()))

    def test_documents_are_isolated(self, variant: Any) -> None:
        """A packed document computes what it would alone, and no other moves when it changes."""
        _, site, module = self.make(variant)
        seq_idx = packed(DOCUMENTS)
        x = seeded(*seq_idx.shape, site.d_model)
        with torch.no_grad():
            y = module(x, seq_idx)
            for row, lengths in enumerate(DOCUMENTS):
                for i in range(len(lengths)):
                    own = seq_idx[row] == i
                    assert distance(y[row, own], module(x[row, own][None])[0]) <= EQUAL, f"document {i} of row {row}"
                    changed = x.clone()
                    changed[row, own] = seeded(lengths[i], site.d_model, seed=1)
                    moved = module(changed, seq_idx)
                    assert distance(moved[row, ~own], y[row, ~own]) <= EXACT, f"document {i} of row {row} leaks"
            assert distance(module(x, torch.zeros_like(seq_idx)), module(x)) <= EQUAL

    def test_shared_keys_and_values(self, variant: Any) -> None:
        """A block that reads this one's keys and values computes the same in one pass and while decoding."""
        spec = self.spec(variant)
        site = self.site(spec)
        if spec.kv_format(site) is None:
            assert not spec.can_read(spec, site)
            return
        assert spec.can_read(spec, site)
        model = build_model(
            ModelSpec(site.d_model, CONTEXT, 2, (Block(spec, NoFFN()), Block(spec, NoFFN(), kv_from=0)))
        )
        source: Any = model.blocks[0].mixer
        reader: Any = model.blocks[1].mixer
        x, z = seeded(2, 81, site.d_model), seeded(2, 81, site.d_model, seed=1)
        with torch.no_grad():
            assert torch.equal(source.attend(x, source.make_kv(x), 0, None), source(x))
            whole = reader.attend(z, source.make_kv(x), 0, None)
            assert reader.init_state(2, 81, x.device, x.dtype) == {}
            state, position = source.init_state(2, 81, x.device, x.dtype), 0
            for n in [*pieces(71, 0), *[1] * 10]:
                now = slice(position, position + n)
                y = reader.attend(z[:, now], source.make_kv(x[:, now], state, position), position, None)
                assert distance(y, whole[:, now]) <= EQUAL, f"{n} tokens at {position}"
                position += n
