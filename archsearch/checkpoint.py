"""Checkpoints: all that a stopped training needs to go on in another process as if it had never stopped.

One safetensors file (no pickle): weights, optimiser moments and random states as tensors, the rest as JSON in its
header. The schedule and the data order are functions of the step, so the step is their whole state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from archsearch.architecture import Architecture, ModelSpec
from archsearch.errors import RunError
from archsearch.settings import Train
from archsearch.store import sync_path
from archsearch.store.disk import explained

FORMAT = 1
HEADER = "archsearch"  # key of the JSON in the file's header
MODEL, OPTIMIZER, RANDOM = "model/", "optimizer/", "random/"  # prefixes of tensor names


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    curve: (tokens, loss) pairs; seconds_per_step: the median of the part that trained last.
    """

    step: int = 0
    seconds_per_step: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A training that stands still. The tensors are the model's and the optimiser's own until it is saved."""

    spec: ModelSpec
    settings: Train
    corpus_sha256: str
    progress: Progress
    tensors: dict[str, Tensor]

    def model_state(self) -> dict[str, Tensor]:
        """Weights and buffers by name, shared ones once."""
        return {name.removeprefix(MODEL): t for name, t in self.tensors.items() if name.startswith(MODEL)}

    def of_the_end(self) -> Self:
        """Without moments, two thirds of it: a training that has used up its budget takes no further step."""
        return replace(self, tensors={name: t for name, t in self.tensors.items() if not name.startswith(OPTIMIZER)})

    def check(self, spec: ModelSpec, settings: Train, corpus_sha256: str) -> None:
        """Raise RunError if this is the training of something else; says of what."""
        found: list[str] = []
        if _arch_id(self.spec) != _arch_id(spec):
            found.append(f"its architecture is {_arch_id(self.spec)} and not {_arch_id(spec)}")
        theirs, ours = self.settings.model_dump(), settings.model_dump()
        found += [f"its train.{k} is {theirs[k]} and not {ours[k]}" for k in ours if theirs[k] != ours[k]]
        if self.corpus_sha256 != corpus_sha256:
            found.append(f"its corpus has sha256 {self.corpus_sha256[:12]} and not {corpus_sha256[:12]}")
        if found:
            raise RunError("cannot go on from this checkpoint: " + "; ".join(found))


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spec: ModelSpec,
    settings: Train,
    corpus_sha256: str,
    progress: Progress,
) -> Checkpoint:
    """The state of a training now, without copying it. The optimiser's parameters must be named (torch >= 2.6)."""
    tensors = {MODEL + name: t.detach() for name, t in _owned(model).items()}
    names = _optimizer_names(optimizer)
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{key}/{names[index]}": t for key, t in moments.items()}
    tensors[RANDOM + "cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[RANDOM + "cuda"] = torch.cuda.get_rng_state(device)
    return Checkpoint(spec, settings, corpus_sha256, progress, tensors)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back: weights, moments and the random states of torch, which become this process's.

    Random states of a device that this process does not use are left out. The checkpoint must have passed `check`.
    """
    state = checkpoint.model_state()
    owned = _owned(model)
    assert state.keys() == owned.keys(), "the same architecture has the same tensors"
    with torch.no_grad():
        for name, tensor in owned.items():
            tensor.copy_(state[name])
    moments: dict[int, dict[str, Tensor]] = {}
    numbers = {name: index for index, name in _optimizer_names(optimizer).items()}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(OPTIMIZER):
            key, _, parameter = name.removeprefix(OPTIMIZER).partition("/")
            moments.setdefault(numbers[parameter], {})[key] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(checkpoint.tensors[RANDOM + "cpu"].cpu())
    device = next(model.parameters()).device
    if device.type == "cuda" and RANDOM + "cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors[RANDOM + "cuda"].cpu(), device)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all: beside its place first, synced, then renamed over it.

    Raises RunError, with the path and what to do, where the disk takes no more.
    """
    header = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_json(),
        "settings": checkpoint.settings.model_dump(mode="json"),
        "corpus_sha256": checkpoint.corpus_sha256,
        "progress": asdict(checkpoint.progress),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tensors = {name: t.contiguous() for name, t in checkpoint.tensors.items()}
            save_file(tensors, beside, metadata={HEADER: json.dumps(header)})
            sync_path(beside)
            beside.replace(path)
            sync_path(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint; raises RunError if the file is missing, cut short or not a checkpoint of this format."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot read this checkpoint: {error}") from error
    progress = header["progress"]
    return Checkpoint(
        spec=ModelSpec.from_json(header["spec"]),
        settings=Train.model_validate(header["settings"]),
        corpus_sha256=header["corpus_sha256"],
        progress=Progress(**{**progress, "curve": tuple((tokens, loss) for tokens, loss in progress["curve"])}),
        tensors=tensors,
    )


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if metadata is None or HEADER not in metadata:
        raise RunError(f"{path}: not a checkpoint of archsearch")
    header: dict[str, Any] = json.loads(metadata[HEADER])
    if header["format"] != FORMAT:
        raise RunError(f"{path}: checkpoint of format {header['format']}; this version reads format {FORMAT}")
    return header


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, under the first of its names."""
    persistent = model.state_dict().keys()
    return {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if name in persistent}


def _optimizer_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    groups = optimizer.state_dict()["param_groups"]
    return {i: name for group in groups for i, name in zip(group["params"], group["param_names"], strict=True)}


def _arch_id(spec: ModelSpec) -> str:
    return Architecture({"proxy": spec}).arch_id
