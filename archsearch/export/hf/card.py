"""The model card (README.md with its front matter) and the first lines of the files of a Hugging Face folder."""

from __future__ import annotations

import textwrap
from typing import Any

from archsearch.export.card import Card, labels, legend_of
from archsearch.export.hf.tokenizer import TokenizerFiles
from archsearch.notation import run_length

REQUIRES = "transformers>=5.14,<6"


class HubCard(Card):
    """A `Card` for transformers' users."""

    def front_matter(self, tokenizer: TokenizerFiles | None) -> str:
        """What the Hub reads off a card; text from elsewhere is quoted."""
        return front_matter(self, tokenizer, "hybrid", "custom_code")

    def modeling_docstring(self, code: str) -> str:
        """The first lines of modeling_<name>.py."""
        found = [labels(block) for block in self.spec.blocks]
        lines = [
            f"{self.name}: a language model of {self.size}, for transformers.",
            "",
            f"Mixers: {run_length([mixer for mixer, _ in found])}",
            f"FFNs:   {run_length([ffn for _, ffn in found])}",
            "",
            *textwrap.wrap(f"Letters in shapes: {legend_of(code)}.", 100),
        ]
        return "\n".join(lines) + "\n"

    def configuration_docstring(self) -> str:
        """The first line of configuration_<name>.py."""
        return f"The configuration of {self.name}, for transformers."

    def config(self) -> dict[str, Any]:
        """architecture.json: the model as archsearch reads it back, and where it comes from."""
        return {**super().config(), "class": "HybridForCausalLM"}

    @property
    def summary(self) -> str:
        return (
            f"A hybrid language model for transformers: {self.size}, {self.spec.dtype}. Its vocabulary has "
            f"{self.spec.vocab_size:,} tokens; it is made for contexts of {self.spec.context:,}."
        )

    def use(self) -> str:
        """How to load it, train it and measure it."""
        start = ['model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)']
        names = "AutoModelForCausalLM"
        if not self.has_weights:
            names = "AutoConfig, AutoModelForCausalLM"
            start = [
                'config = AutoConfig.from_pretrained(".", trust_remote_code=True)',
                "model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)  # nothing is trained yet",
            ]
        code = [f"from transformers import {names}", "", *start]
        if self.main and self.end_id is not None:
            code[0] += ", AutoTokenizer"
            code += [
                'tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)',
                'inputs = tokenizer("import ", return_tensors="pt")',
                "tokens = model.generate(**inputs, max_new_tokens=100)",
                "print(tokenizer.decode(tokens[0]))",
            ]
        else:
            code += ["tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=100)"]
            code.insert(0, "import torch")
        block = "\n".join(code)
        told = (
            f"It needs torch and {REQUIRES}. The code in this folder is short and for this layout alone: read it. "
            "Everything that `generate` offers works but assisted decoding, which recurrent states exclude. Packed "
            "documents are told apart by `seq_idx`, or by position_ids that start again."
        )
        how = "trains it further, with `--fresh` from the start" if self.has_weights else "trains it"
        data = "'text/*.txt'" if self.end_id is not None else "tokens.bin"
        training = (
            f"`python train.py --data {data} --tokens 1e9 --out trained` {how}; with torchrun on many devices. "
            "Learning rates follow the width as in the search."
        )
        texts = [f"```python\n{block}\n```", textwrap.fill(told, 120), textwrap.fill(training, 120)]
        texts += [self.kernels] if self.kernels else []
        return "\n\n".join(texts)


def front_matter(card: Card, tokenizer: TokenizerFiles | None, *tags: str) -> str:
    """The first lines of a card, for the Hub; `tags` besides our own."""
    license_ = str(card.provenance.get("license") or "other")
    name = license_.lower() if license_.lower() in ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0") else "other"
    lines = ["library_name: transformers", f"license: {name}"]
    lines += ["pipeline_tag: text-generation"] if tokenizer is not None else []
    lines += ["tags:", *(f"- {tag}" for tag in ("archsearch", *tags))]
    return "\n".join(["---", *lines, "---"]) + "\n\n"
