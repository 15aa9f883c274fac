"""README.md and config.json of an exported folder: what the model is, how it was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from archsearch.architecture import ModelSpec
from archsearch.draw import compact, human_count, table
from archsearch.export.parity import Parity

SAFE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
FORMAT = 1


def named_safely(spec: ModelSpec) -> ModelSpec:
    """The model with names from the space only where they are plain words, else the kind: texts quote them."""
    return replace(
        spec,
        blocks=tuple(
            replace(
                b,
                mixer_name=b.mixer_name if SAFE_NAME.fullmatch(b.mixer_name) else b.mixer.kind,
                ffn_name=b.ffn_name if SAFE_NAME.fullmatch(b.ffn_name) else b.ffn.kind,
            )
            for b in spec.blocks
        ),
    )


def docstring(spec: ModelSpec, name: str, n_params: int, has_weights: bool, main: str | None) -> str:
    """What stands first in model.py."""
    safe = named_safely(spec)
    use = {"bytes": 'python model.py "import "', "ids": "python model.py 1 2 3"}
    lines = [
        f"{name}: a language model of {spec.n_blocks} blocks, width {spec.d_model}, {human_count(n_params)} parameters.",
        "",
        f"Mixers: {compact([b.mixer_name for b in safe.blocks])}",
        f"FFNs:   {compact([b.ffn_name for b in safe.blocks])}",
        "",
        "    model = HybridLM.from_pretrained(folder)  # or HybridLM(), then init_weights() to train from scratch"
        if has_weights
        else "    model = HybridLM()",
    ]
    if not has_weights:
        lines.append("    model.init_weights()  # nothing is trained yet")
    lines.append("    tokens = model.generate(prompt, max_new_tokens=100)  # [B, T] ids to [B, T + 100]")
    if main is not None:
        lines += ["", f"Try it: {use[main].replace(chr(34), chr(39))}"]
    lines += [
        "",
        "Shapes: B batch, T time, S keys, D width, H heads, G key/value heads, K key and V value features of a head,",
        "N state, E experts, C chunk.",
    ]
    return "\n".join(lines) + "\n"


def config(spec: ModelSpec, name: str, parity: Parity, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds: sizes for programs, and the model as archsearch reads it back."""
    safe = named_safely(spec)
    return {
        "format": FORMAT,
        "name": name,
        "class": "HybridLM",
        "dtype": spec.dtype,
        "vocab_size": spec.vocab_size,
        "d_model": spec.d_model,
        "n_blocks": spec.n_blocks,
        "context": spec.context,
        "n_params": parity.n_params,
        "mixers": [b.mixer_name for b in safe.blocks],
        "ffns": [b.ffn_name for b in safe.blocks],
        "architecture": spec.to_json(),
        "provenance": dict(provenance),
    }


def readme(spec: ModelSpec, name: str, parity: Parity, has_weights: bool, provenance: Mapping[str, Any]) -> str:
    """README.md. Of `provenance` it reads, where given: study, description, trial, arch_id, scale, objectives (by name:
    value, spread, n, unit, where), task, train, tokens, environment, license.
    """
    parts = [
        f"# {name}",
        f"A language model of {spec.n_blocks} blocks, width {spec.d_model} and {human_count(parity.n_params)} parameters "
        f"({spec.dtype}), with a vocabulary of {spec.vocab_size:,} and a context of {spec.context:,} tokens, in one "
        "file of plain PyTorch.",
        "## Layout",
        f"```\n{table(named_safely(spec))}\n```",
        "## Use",
        _use(has_weights, provenance),
    ]
    objectives = provenance.get("objectives") or {}
    if objectives:
        rows = [_objective(n, o) for n, o in objectives.items()]
        parts += [
            "## Measured in the search",
            "\n".join(["| objective | value | spread | how |", "| --- | --- | --- | --- |", *rows]),
            "Spread: one standard deviation; of latencies half of the 10th to the 90th percentile.",
        ]
    parts += ["## Checked", f"Against the model of the search: {parity.what}; largest difference {parity.difference:.1e}."]
    story = _story(provenance)
    if story:
        parts += ["## Where it comes from", story]
    parts += ["## Licence", _quoted(provenance.get("license")) or "Not stated. The code is Apache-2.0, as archsearch is."]
    return "\n\n".join(parts) + "\n"


def _use(has_weights: bool, provenance: Mapping[str, Any]) -> str:
    load = "model = HybridLM.from_pretrained('.')" if has_weights else "model = HybridLM()\nmodel.init_weights()  # untrained"
    code = (
        f"import torch\nfrom model import HybridLM\n\n{load}\n"
        "prompt = torch.tensor([[1, 2, 3]])  # [B, T] token ids\n"
        "logits = model(prompt)  # [B, T, vocab]\n"
        "tokens = model.generate(prompt, max_new_tokens=100)"
    )
    task = provenance.get("task") or {}
    is_bytes = task.get("tokenizer") == "bytes"
    ids = "Token ids are bytes; 256 ends a document." if is_bytes else "Token ids are the tokenizer's of the study."
    needs = "Needs torch, and safetensors to read the weights." if has_weights else "Needs torch. There are no weights yet."
    return f"```python\n{code}\n```\n\n{needs} {ids}"


def _objective(name: str, o: Mapping[str, Any]) -> str:
    spread = f"{o['spread']:.3g} (n = {o.get('n', 1)})" if o.get("spread") is not None else ""
    return f"| {_cell(name)} | {o['value']:.5g} {_cell(o.get('unit', ''))} | {spread} | {_cell(o.get('where', ''))} |"


def _story(provenance: Mapping[str, Any]) -> str:
    lines = []
    for key in ("study", "description", "trial", "arch_id", "scale", "trained", "data", "device", "software"):
        if provenance.get(key) not in (None, ""):
            lines.append(f"- {key}: {_quoted(provenance[key])}")
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Text from elsewhere on one line, as text: no markup, no markdown."""
    if value is None:
        return ""
    plain = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#!&])", r"\\\1", plain)


def _cell(value: object) -> str:
    return _quoted(value)
