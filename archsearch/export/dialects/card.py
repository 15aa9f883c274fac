"""The model card of a folder that a stock class loads."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, ClassVar

from archsearch.export.card import Card
from archsearch.export.dialects.base import Dialect
from archsearch.export.hf.card import front_matter
from archsearch.export.hf.tokenizer import TokenizerFiles


@dataclass(frozen=True)
class DialectCard(Card):
    """A `Card` for users of the stock class. architecture: its name; tokenizer: whether one lies in the folder."""

    dialect: Dialect | None = None
    architecture: str = ""
    tokenizer: bool = False

    unstated: ClassVar[str] = "Of the weights: not stated."

    def front_matter(self, tokenizer: TokenizerFiles | None) -> str:
        """What the Hub reads off a card."""
        return front_matter(self, tokenizer, "hybrid")

    def config(self) -> dict[str, Any]:
        """architecture.json: the model as archsearch reads it back, and where it comes from."""
        return {**super().config(), "class": self.architecture}

    @property
    def summary(self) -> str:
        assert self.dialect is not None
        return (
            f"A language model of {self.size}, {self.spec.dtype}, that {self.dialect.title}'s own class runs "
            f"(`{self.architecture}`); no code comes with it. Its vocabulary has {self.spec.vocab_size:,} tokens; it "
            f"is made for contexts of {self.spec.context:,}."
        )

    def use(self) -> str:
        """How to load it."""
        assert self.dialect is not None
        imported = ["AutoModelForCausalLM"] if self.has_weights else ["AutoConfig", "AutoModelForCausalLM"]
        imported += ["AutoTokenizer"] if self.tokenizer else []
        code = [f"import {package}" for package in self.dialect.needs if package != "transformers"]
        code += [] if self.tokenizer else ["import torch"]
        code += [f"from transformers import {', '.join(imported)}", ""]
        if self.has_weights:
            code += ['model = AutoModelForCausalLM.from_pretrained(".")']
        else:
            code += ['model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("."))  # not trained yet']
        if self.tokenizer:
            code += [
                'tokenizer = AutoTokenizer.from_pretrained(".")',
                'tokens = model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=100)',
                "print(tokenizer.decode(tokens[0]))",
            ]
        else:
            code += ["tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=100)"]
        needs = ", ".join(f"`{install}`" for install in self.dialect.needs.values())
        block = "\n".join(code)
        return f"```python\n{block}\n```\n\n" + textwrap.fill(f"It needs torch and {needs}.", 120)
