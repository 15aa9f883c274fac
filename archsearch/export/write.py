"""Writes the folder of an exported model, of plain torch, for transformers or in a dialect, or nothing at all."""

from __future__ import annotations

import gc
import json
import keyword
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from archsearch.architecture import Architecture, ModelSpec
from archsearch.errors import ExportError, did_you_mean, one_of
from archsearch.export.card import Card, tokenizer_name
from archsearch.export.dialects import DIALECTS, dialect
from archsearch.export.kernels import Kernels, said_in_card, used
from archsearch.export.pick import introduce, pick
from archsearch.report.front import Axis
from archsearch.store import RunFolder, TrialRecord
from archsearch.store.folder import TOKENIZER

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"] | Literal["init"] | None
FORMATS = ("torch", "hf", *DIALECTS)


def _silent(text: str) -> None:
    """Nobody is at a terminal."""


def export_model(
    model_spec: ModelSpec,
    out: Path,
    *,
    weights: Weights = None,
    name: str,
    provenance: Mapping[str, Any] | None = None,
    format: str = "torch",
    base_dir: Path | None = None,
    kernels: Kernels = "installed",
    say: Callable[[str], None] = _silent,
) -> Path:
    """Write a model to the folder `out`, which must be new or empty; returns it.

    weights: a state dict of `archsearch.model.HybridLM` (shared tensors may be missing under their later names),
    `init` for fresh ones, None for none. name: a Python identifier. provenance: see `Card`; goes to README.md and
    config.json. format: `torch`, one file that needs nothing else; `hf`, a folder for transformers; or a dialect, a
    folder that a stock class loads (see `dialects`). The tokenizer, whose path is relative to `base_dir`, goes along.
    The result is compared with the search model first (see `parity`); `say` gets what could not be compared. kernels:
    where the Triton kernels of `torch` and `hf` come from (see `kernels`). Raises ExportError if anything is wrong;
    then nothing is left behind.
    """
    _check_name(name)
    if format not in FORMATS:
        raise ExportError(f"there is no format {format!r}; expected {one_of(FORMATS)}.{did_you_mean(format, FORMATS)}")
    given = provenance or {}
    main = _main(model_spec, weights, given)
    with _folder(out) as beside, _uncollected():
        if format == "hf":
            from archsearch.export.hf.card import HubCard
            from archsearch.export.hf.folder import write_folder

            write_folder(
                HubCard(name, model_spec, weights is not None, main, given), weights, beside, base_dir, kernels
            )
        elif format in DIALECTS and kernels == "vendored":
            raise ExportError(f"--format {format} has stock code, which has no place for kernels; use hf or torch")
        elif format in DIALECTS:
            _write_dialect(format, (name, model_spec, weights is not None, main, given), weights, beside, base_dir, say)
        else:
            card = _with_tokenizer(Card(name, model_spec, weights is not None, main, given), beside, base_dir, say)
            _write(card, weights, beside, kernels)
    return out


def export_run(
    run_folder: Path,
    how: str,
    scale: str,
    out: Path,
    name: str | None = None,
    *,
    format: str = "torch",
    fresh: bool = False,
    kernels: Kernels = "installed",
    say: Callable[[str], None] = _silent,
) -> Path:
    """Write one trial of a run to the folder `out`: with its trained weights at proxy scale, without any at target.

    how: see `pick`. name: by default the study's name and the arch_id. format, kernels, say: see `export_model`.
    `fresh`: new initial weights in their place. Raises RunError or ExportError.
    """
    folder = RunFolder.open(run_folder)
    settings, records = folder.read_json("settings.json"), folder.records()
    record = pick(records, settings, how)
    architecture = Architecture.from_json(record.architecture)
    if scale not in architecture.scales:
        raise ExportError(f"there is no scale {scale!r}; expected {one_of(architecture.scales)}")
    if name is None:
        name = f"{_identifier(str(settings.get('name', '')))}_{record.arch_id}"
    weights: Weights = "init" if fresh else None
    if scale == "proxy" and not fresh:
        weights = _trained(folder, record)
    environment = folder.read_json("environment.json")
    told = provenance(settings, environment, record, scale)
    if fresh:
        told["trained"] = "not at all: the weights are initial ones"
    spec = architecture.at(scale)
    given: Any = {"provenance": told, "format": format, "kernels": kernels, "say": say}
    if folder.inside(TOKENIZER).is_file():
        told["tokenizer"], given["base_dir"] = TOKENIZER, folder.path
    elif made_with := environment.get("tokenizer"):  # runs of older versions do not say
        told["tokenizer"] = "bytes" if made_with["sha256"] == "bytes" else None
        if told["tokenizer"] is None:
            say(f"no tokenizer goes into the folder: all that is known of it is its name, {made_with['name']}")
    written = export_model(spec, out, weights=weights, name=name, **given)
    say(introduce(records, settings, record))
    return written


def provenance(
    settings: Mapping[str, Any], environment: Mapping[str, Any], record: TrialRecord, scale: str
) -> dict[str, Any]:
    """What a run folder tells of one trial, as `Card` reads it."""
    axes = {axis.name: axis for axis in map(Axis.read, settings["objectives"])}
    tokens = f"{record.tokens:,} tokens at proxy scale" if record.tokens else None
    task = settings.get("task", {})
    sha = environment.get("corpus_sha256")
    return {
        "study": settings.get("name"),
        "description": settings.get("description"),
        "trial": record.trial,
        "arch_id": record.arch_id,
        "scale": scale,
        "task": task,
        "train": record.train,
        "trained": tokens if scale == "proxy" else tokens and f"the search trained it for {tokens}, not at this one",
        "data": f"{task.get('corpus', 'unknown')}" + (f", sha256 {sha}" if sha else ""),
        "device": record.device,
        "software": ", ".join(f"{k} {v}" for k, v in (environment.get("packages") or {}).items()),
        "objectives": {
            key: {
                "value": found.value,
                "spread": found.spread,
                "n": found.n,
                "unit": axes[key].unit if key in axes else "",
                "where": axes[key].where if key in axes else "",
            }
            for key, found in record.objectives.items()
        },
    }


def _trained(folder: RunFolder, record: TrialRecord) -> dict[str, Tensor]:
    from archsearch.checkpoint import load

    path = None if record.checkpoint is None else folder.inside(record.checkpoint)
    if path is None or not path.is_file():
        raise ExportError(
            f"the weights of trial {record.trial} were not kept: a run keeps those of its front and its baselines "
            "(runtime.keep_checkpoints: all keeps more, none keeps none). Pick one of these, or export the layout: "
            "--init for fresh weights, --scale target for the larger model without any"
        )
    return load(path).model_state()


def _check_name(name: str) -> None:
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise ExportError(f"the name {name!r} is no Python identifier; write letters, digits and _ such as my_model")


def _identifier(text: str) -> str:
    """The nearest Python identifier."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    return words if words[:1].isalpha() else f"model_{words}".rstrip("_")


def _main(spec: ModelSpec, weights: Weights, given: Mapping[str, Any]) -> str | None:
    if weights is None:
        return None
    return "bytes" if tokenizer_name(given) == "bytes" and spec.vocab_size > 255 else "ids"


def _with_tokenizer(card: Card, folder: Path, base_dir: Path | None, say: Callable[[str], None]) -> Card:
    """The card, once the tokenizer.json lies in the folder; bytes need none, and one that is not there is told."""
    from archsearch.export.hf.tokenizer import tokenizer_files

    name = tokenizer_name(card.provenance)
    if name in (None, "bytes"):
        return card
    try:
        files = tokenizer_files(name, card.spec.vocab_size, card.spec.context, base_dir)
    except ExportError as error:
        say(str(error))
        return card
    if files is None:  # the model's vocabulary is another
        return replace(card, provenance={**card.provenance, "tokenizer": None})
    files.write_content(folder)
    return replace(card, end_id=files.end_id)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: syntax trees and a model's steps are many small objects, hardly one of them lost."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well, and vanishes if not."""
    beside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise ExportError(f"{out} is not an empty folder; name a new one")
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        raise ExportError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_dialect(
    name: str,
    facts: tuple[str, ModelSpec, bool, str | None, Mapping[str, Any]],
    weights: Weights,
    folder: Path,
    base_dir: Path | None,
    say: Callable[[str], None],
) -> None:
    from archsearch.export.dialects.card import DialectCard
    from archsearch.export.dialects.folder import write_folder

    write_folder(DialectCard(*facts, dialect=dialect(name)), weights, folder, base_dir, say)


def _write(card: Card, weights: Weights, folder: Path, kernels: Kernels) -> None:
    from archsearch.export.code import model_code
    from archsearch.export.parity import check_parity

    code = model_code(card.spec, card.main, kernels, card.name)
    path = folder / "model.py"
    path.write_text(f'"""{card.docstring(code)}"""\n\n{code}')
    card = replace(card, kernels=said_in_card(used(code), kernels, f"{card.name}_kernels"))
    if kernels == "vendored" and used(code):
        from archsearch.export.vendor import write_package

        write_package(used(code).values(), folder / f"{card.name}_kernels")
    parity = check_parity(card.spec, path)
    if weights is not None:
        _save_weights(card.spec, weights, path, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(card.config(), indent=1) + "\n")
    worst = f"{parity.difference:.1e} of the largest value" if parity.difference else "none"
    checked = f"Against the model of the search: {parity.what}; largest difference: {worst}. {parity.kernels}".rstrip()
    (folder / "README.md").write_text(card.readme(checked))


def _save_weights(spec: ModelSpec, weights: Mapping[str, Tensor] | Literal["init"], code: Path, out: Path) -> None:
    """Load them into the exported model, which checks them, and save its tensors, shared ones once."""
    import torch
    from safetensors.torch import save_model

    from archsearch.export.parity import loaded
    from archsearch.model import build_model

    dtype = getattr(torch, spec.dtype)
    if weights == "init":
        weights = build_model(spec, seed=0, dtype=dtype).state_dict()
    with loaded(code) as module:
        model = module.HybridLM().to(dtype)
        owned = dict(model.named_parameters()) | dict(model.named_buffers())  # shared tensors once
        known = model.state_dict()
        wrong = [f"{name} is not one of its tensors" for name in weights if name not in known]
        wrong += [f"{name} is missing" for name in known if name in owned and name not in weights]
        wrong += [
            f"{name} is {list(tensor.shape)} and not {list(known[name].shape)}"
            for name, tensor in weights.items()
            if name in known and tensor.shape != known[name].shape
        ]
        if wrong:
            raise ExportError(f"the weights do not fit the model: {', '.join(wrong[:3])}")
        model.load_state_dict(dict(weights), strict=False)
        save_model(model, str(out), metadata={"format": "pt"})
    out.chmod(code.stat().st_mode)  # safetensors makes it private
