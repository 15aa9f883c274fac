"""Writes a folder that a stock class loads: configuration, weights, tokenizer, card; checked before anybody sees it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from archsearch.errors import ExportError
from archsearch.export.dialects.base import Dialect
from archsearch.export.dialects.card import DialectCard
from archsearch.export.dialects.translate import Translation, translate
from archsearch.export.hf.folder import fitting, generation, require_transformers, tokenizer_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"] | Literal["init"] | None


def write_folder(
    card: DialectCard,
    weights: Weights,
    folder: Path,
    base_dir: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill `folder`; raises Refused with the block that the dialect cannot express, ExportError for anything else.

    base_dir: what the tokenizer's path is relative to. say: gets what the person at the terminal should know.
    """
    from archsearch.export.dialects.parity import check_folder

    dialect = card.dialect
    assert dialect is not None
    translation = translate(dialect, card.spec)
    dialect = translation.dialect
    dialect.check_layout(card.spec, translation.layers)
    require(dialect)
    tokenizer = tokenizer_of(card, base_dir)
    architecture = translation.config["architectures"][0]
    card = replace(card, dialect=dialect, architecture=architecture, tokenizer=tokenizer is not None)
    end_id, pad_id = (None, None) if tokenizer is None else (tokenizer.end_id, tokenizer.pad_id)
    # no padding token: stock embeddings give theirs no gradient, and here it would be the one that ends documents
    config = {**translation.config, "bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": None}
    with quiet(), dialect.on_cpu():
        stock_config = dialect.stock_class(config).config_class.from_dict(config)
        state = None if weights is None else fitting(card.spec, weights)
        if state is not None:
            _save(translation, stock_config, state, folder)
        stock_config.save_pretrained(folder)
    _keep(config, folder / "config.json")
    write_json(folder / "generation_config.json", generation(end_id, pad_id))
    write_json(folder / "architecture.json", card.config())
    if tokenizer is not None:
        tokenizer.write(folder)
    parity = check_folder(translation, folder, state)
    for line in parity.notes:
        say(f"{dialect.name}: {line}")
    (folder / "README.md").write_text(card.front_matter(tokenizer) + card.readme(parity.text()))


def require(dialect: Dialect) -> None:
    """Raise ExportError unless the library of the stock class is installed, and transformers anyway."""
    require_transformers(dialect.name)
    for package, install in dialect.needs.items():
        if not _installed(package):
            raise ExportError(f"{package} is not installed; --format {dialect.name} needs it: pip install '{install}'")


def _installed(package: str) -> bool:
    with quiet():
        try:
            return importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # what it is a part of
            return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, and without what libraries say of a machine without a GPU."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _save(translation: Translation, config: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors as the stock class saves them itself, experts apart where it does that.

    A tensor that the model's dtype holds exactly is saved in it; one that took up a factor may not fit any more and
    is saved in float32, so that loading in the model's dtype rounds it once.
    """
    import torch

    dtype = getattr(torch, translation.spec.dtype)
    wide = {
        name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in state.items() if t.is_floating_point()
    }
    tensors = {}
    for name, tensor in translation.tensors({**state, **wide}).items():
        narrow = tensor.to(dtype)
        tensors[name] = (narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor).contiguous()
    stock = meta_model(translation, config)
    stock.load_state_dict(tensors, strict=False, assign=True)  # `parity` has the names checked on loading
    stock.tie_weights()
    stock.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # several if it is large
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private


def meta_model(translation: Translation, config: Any) -> Any:
    """The stock model without memory; every tensor of the translation has its place in it, and no other has one.

    Raises ExportError if names or shapes differ, which would be a mistake of the dialect.
    """
    import torch

    from archsearch.model import HybridLM

    with torch.device("meta"):
        stock = translation.dialect.stock_class(translation.config)(config)
        ours = {
            name: tuple(t.shape) for name, t in translation.tensors(HybridLM(translation.spec).state_dict()).items()
        }
    tied = {translation.dialect.names.head} if translation.spec.trunk.tie_embeddings else set()
    theirs = {name: tuple(t.shape) for name, t in stock.state_dict().items() if name not in tied}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        told = ", ".join(f"{n} is {ours.get(n, 'missing')} and not {theirs.get(n, 'there')}" for n in wrong[:5])
        raise ExportError(f"--format {translation.dialect.name} has other tensors than the stock class: {told}")
    return stock


def _keep(config: Mapping[str, Any], path: Path) -> None:
    """What the stock configuration wrote, with our dtype and tokens, which it leaves out or guesses from tensors."""
    written = json.loads(path.read_text())
    given = ("architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    write_json(path, written | {key: config[key] for key in given})
