"""What is written about an exported model: the first lines of model.py, config.json, README.md."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from archsearch.architecture import Block, ModelSpec
from archsearch.cost import block_costs, params
from archsearch.notation import in_bytes, plain, run_length, si

FORMAT = 1
PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
LETTERS = {
    "B": "batch",
    "T": "time",
    "S": "keys",
    "D": "width",
    "H": "heads",
    "G": "key/value heads",
    "K": "key features of a head",
    "V": "value features of a head",
    "N": "state",
    "E": "experts",
    "C": "chunk",
}
TRY_IT = {"bytes": "python model.py 'import '", "ids": "python model.py 1 2 3"}


@dataclass(frozen=True)
class Card:
    """The facts of one export.

    provenance: plain data about where the model comes from. Read are study, description, trial, arch_id, scale, task,
    trained, data, device, software, license (text each; task as in the settings), tokenizer (see `tokenizer_name`) and
    objectives (by name: value, spread, n, unit, where). kernels: what there is to say of Triton kernels. end_id: of
    the tokenizer.json that lies in the folder; None where there is none.
    """

    name: str
    spec: ModelSpec
    has_weights: bool
    main: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kernels: str = field(default="", kw_only=True)
    end_id: int | None = field(default=None, kw_only=True)

    unstated: ClassVar[str] = "Of the code: Apache-2.0. Of the weights: not stated."  # where no licence is given

    @property
    def size(self) -> str:
        """Blocks, width and parameters in words."""
        return f"{self.spec.n_blocks} blocks, width {self.spec.d_model}, {si(params(self.spec))} parameters"

    def docstring(self, code: str) -> str:
        """The first lines of model.py; of the letters in shapes those that `code` uses."""
        found = [labels(block) for block in self.spec.blocks]
        start = "HybridLM.from_pretrained(folder)" if self.has_weights else "HybridLM()"
        lines = [
            f"{self.name}: a language model of {self.size}.",
            "",
            f"Mixers: {run_length([mixer for mixer, _ in found])}",
            f"FFNs:   {run_length([ffn for _, ffn in found])}",
            "",
            f"    model = {start}",
            *([] if self.has_weights else ["    model.init_weights()  # nothing is trained yet"]),
            "    logits = model(tokens)  # [B, T] ids to [B, T, vocab]",
            "    tokens = model.generate(tokens, max_new_tokens=100)",
            "",
            *([f"Try it: {TRY_IT[self.main]}", ""] if self.main else []),
            *textwrap.wrap(f"Letters in shapes: {legend_of(code)}.", 100),
        ]
        return "\n".join(lines) + "\n"

    def config(self) -> dict[str, Any]:
        """config.json: sizes for programs, the layout for people, and the model as archsearch reads it back."""
        spec = self.spec
        found = [labels(block) for block in spec.blocks]
        return {
            "format": FORMAT,
            "name": self.name,
            "class": "HybridLM",
            "dtype": spec.dtype,
            "vocab_size": spec.vocab_size,
            "d_model": spec.d_model,
            "n_blocks": spec.n_blocks,
            "context": spec.context,
            "n_params": params(spec),
            "mixers": [mixer for mixer, _ in found],
            "ffns": [ffn for _, ffn in found],
            "model": spec.to_json(),
            "provenance": dict(self.provenance),
        }

    def readme(self, checked: str) -> str:
        """README.md; `checked` says what the code was compared with."""
        spec, given = self.spec, self.provenance
        sections = [
            (self.name, self.summary),
            ("Layout", f"```text\n{_layout(spec)}\n```"),
            ("Use", self.use()),
            ("Measured in the search", _measured(given.get("objectives") or {})),
            ("Checked at export", checked),
            ("Where it comes from", _story(given)),
            ("Licence", _as_text(given.get("license")) or self.unstated),
        ]
        texts = [f"{'#' if i == 0 else '##'} {title}\n\n{text}" for i, (title, text) in enumerate(sections) if text]
        return "\n\n".join(texts) + "\n"

    @property
    def summary(self) -> str:
        """What it is, in two sentences."""
        return (
            f"A language model in one file of plain PyTorch: {self.size}, {self.spec.dtype}. Its vocabulary has "
            f"{self.spec.vocab_size:,} tokens; it is made for contexts of {self.spec.context:,}."
        )

    def use(self) -> str:
        """How to load it, as code, and what that needs."""
        start = ['model = HybridLM.from_pretrained(".")']
        if not self.has_weights:
            start = ["model = HybridLM()", "model.init_weights()  # nothing is trained yet"]
        code = [
            "import torch",
            "",
            "from model import HybridLM",
            "",
            *start,
            "tokens = torch.tensor([[1, 2, 3]])  # [B, T] ids",
            "logits = model(tokens)  # [B, T, vocab]",
            "tokens = model.generate(tokens, max_new_tokens=100)",
        ]
        needs = "It needs torch" + (
            ", and safetensors to read the weights." if self.has_weights else "; there are no weights."
        )
        name = tokenizer_name(self.provenance)
        if name == "bytes":
            needs += " A token is a byte of UTF-8 text; 256 ends a document."
        elif self.end_id is not None:
            needs += f" Tokens are those of `tokenizer.json` (package tokenizers); {self.end_id} ends a document."
        elif name:
            needs += f" Tokens are those of {_as_text(name)}."
        block = "\n".join(code)
        return "\n\n".join([f"```python\n{block}\n```", needs, *([self.kernels] if self.kernels else [])])


def tokenizer_name(provenance: Mapping[str, Any]) -> str | None:
    """`bytes`, a path, or None where nobody knows: what the run folder says, else the task's setting."""
    found = provenance["tokenizer"] if "tokenizer" in provenance else (provenance.get("task") or {}).get("tokenizer")
    return None if found is None else str(found)


def legend_of(code: str) -> str:
    """The dimension letters that shapes in `code` use, with their meanings."""
    shapes = " ".join(re.findall(r"\[[A-Z][^\]\n]*\]", code))
    return ", ".join(f"{k} {what}" for k, what in LETTERS.items() if re.search(rf"\b{k}\b", shapes))


def labels(block: Block) -> tuple[str, str]:
    """What the space calls the mixer and the FFN, where that is a plain word; else their kinds."""
    mixer = block.mixer_name if PLAIN_WORD.fullmatch(block.mixer_name) else block.mixer.kind
    return mixer, block.ffn_name if PLAIN_WORD.fullmatch(block.ffn_name) else block.ffn.kind


def _layout(spec: ModelSpec) -> str:
    """One line for each run of equal blocks."""
    rows: list[tuple[str, ...]] = [("block", "mixer", "ffn", "parameters", f"state at {spec.context:,}", "shared")]
    described = [_described(spec, i) for i in range(spec.n_blocks)]
    at = 0
    for row, same in groupby(described):
        n = len(list(same))
        rows.append((f"{at}" if n == 1 else f"{at}-{at + n - 1}", *row))
        at += n
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _described(spec: ModelSpec, i: int) -> tuple[str, ...]:
    block, costs = spec.blocks[i], block_costs(spec)[i]
    mixer, ffn = labels(block)
    edges = {
        "keys and values": block.kv_from,
        "mixer weights": block.mixer_weights_from,
        "ffn weights": block.ffn_weights_from,
    }
    return (
        mixer if mixer == block.mixer.kind else f"{mixer} ({block.mixer.kind})",
        ffn if ffn == block.ffn.kind else f"{ffn} ({block.ffn.kind})",
        si(costs.params),
        in_bytes(costs.state_bytes),
        ", ".join(f"{what} of {source}" for what, source in edges.items() if source is not None),
    )


def _measured(objectives: Mapping[str, Mapping[str, Any]]) -> str:
    if not objectives:
        return ""
    rows = ["| objective | value | spread | measured |", "| --- | --- | --- | --- |"]
    for name, found in objectives.items():
        value = f"{plain(found['value'])} {_as_text(found.get('unit'))}".rstrip()
        spread = "" if found.get("spread") is None else f"{plain(found['spread'], 2)} (n = {found.get('n', 1)})"
        rows.append(f"| {_as_text(name)} | {value} | {spread} | {_as_text(found.get('where'))} |")
    return "\n".join(
        [*rows, "", "The spread is one standard deviation; of a latency, half of the 10th to the 90th percentile."]
    )


def _story(given: Mapping[str, Any]) -> str:
    keys = ("study", "description", "trial", "arch_id", "scale", "trained", "data", "device", "software")
    return "\n".join(f"- {key}: {_as_text(given[key])}" for key in keys if given.get(key) not in (None, ""))


def _as_text(value: object) -> str:
    """Words from elsewhere on one line, so that nothing in them is markup."""
    plain_text = "" if value is None else " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#!&~])", r"\\\1", plain_text)
