"""Writes everything that a Hugging Face folder holds, and checks it before anybody sees it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from archsearch.architecture import ModelSpec
from archsearch.errors import ExportError
from archsearch.export.card import Card, tokenizer_name
from archsearch.export.hf.card import REQUIRES, HubCard
from archsearch.export.hf.code import configuration_code, layer_types, modeling_code, training_code
from archsearch.export.hf.names import hub_state, shared_names
from archsearch.export.hf.tokenizer import TokenizerFiles, tokenizer_files
from archsearch.export.kernels import Kernels, glue_code, said_in_card, used

if TYPE_CHECKING:
    from torch import Tensor

OLDEST = (5, 14)


def require_transformers(format_name: str = "hf") -> None:
    """Raise ExportError unless a release is installed that the exported code runs on."""
    how = f"--format {format_name} checks the folder with {REQUIRES}: pip install 'archsearch[hf]'"
    if importlib.util.find_spec("transformers") is None:
        raise ExportError(f"transformers is not installed; {how}")
    version = metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ExportError(f"transformers {version} is too old; {how}")


def write_folder(
    card: HubCard,
    weights: Mapping[str, Tensor] | Literal["init"] | None,
    folder: Path,
    base_dir: Path | None = None,
    kernels: Kernels = "installed",
) -> None:
    """Fill `folder`; raises ExportError if anything is wrong with the model, its weights or its tokenizer.

    base_dir: what the tokenizer's path is relative to. kernels: where they come from, see `export.kernels`.
    """
    from archsearch.export.hf.parity import check_folder

    require_transformers()
    spec, name = card.spec, card.name
    _check_model_type(name)
    tokenizer = tokenizer_of(card, base_dir)
    end_id = None if tokenizer is None else tokenizer.end_id
    pad_id = None if tokenizer is None else tokenizer.pad_id
    card = replace(card, end_id=end_id)
    code = modeling_code(spec, name, kernels != "none")
    (folder / f"modeling_{name}.py").write_text(f'"""{card.modeling_docstring(code)}"""\n\n{code}')
    card = replace(card, kernels=_write_kernels(folder, name, used(code), kernels))
    settings = configuration_code(spec, name, end_id)
    (folder / f"configuration_{name}.py").write_text(f'"""{card.configuration_docstring()}"""\n\n{settings}')
    (folder / "train.py").write_text(training_code(spec, card.provenance.get("train") or {}))
    write_json(folder / "config.json", _config(spec, name, end_id, pad_id))
    write_json(folder / "generation_config.json", generation(end_id, pad_id))
    write_json(folder / "architecture.json", card.config())
    if tokenizer is not None:
        tokenizer.write(folder)
    tensors = None
    if weights is not None:
        tensors = _save_weights(spec, weights, folder / "model.safetensors")
    parity = check_folder(spec, folder, name, tensors)
    worst = f"{parity.difference:.1e} of the largest value" if parity.difference else "none"
    checked = (
        f"Against the model of the search, in float32: {parity.what}; largest difference: {worst}. "
        f"{parity.n_params:,} parameters, as the formula of the search says. {parity.kernels}".rstrip()
    )
    (folder / "README.md").write_text(card.front_matter(tokenizer) + card.readme(checked))


def _write_kernels(folder: Path, name: str, ops: Mapping[str, str], way: Kernels) -> str:
    """kernels.py, and the kernels themselves if they are vendored; what the card says of it."""
    if not ops:
        return ""
    (folder / "kernels.py").write_text(glue_code(ops, name, way, beside=None))
    if way == "vendored":
        from archsearch.export.vendor import write_files

        write_files(ops.values(), folder)
    return said_in_card(ops, way, "kernels_*.py")


def _check_model_type(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if name in CONFIG_MAPPING_NAMES:
        raise ExportError(f"transformers has a model called {name!r} already; give this one another --name")


def tokenizer_of(card: Card, base_dir: Path | None) -> TokenizerFiles | None:
    """The task's tokenizer as files, or None if there is none or the model's vocabulary is too small for it."""
    name = tokenizer_name(card.provenance)
    return None if name is None else tokenizer_files(name, card.spec.vocab_size, card.spec.context, base_dir)


def _config(spec: ModelSpec, name: str, end_id: int | None, pad_id: int | None) -> dict[str, Any]:
    classes = {"AutoConfig": f"configuration_{name}.HybridConfig"}
    classes |= {"AutoModel": f"modeling_{name}.HybridModel"}
    classes |= {"AutoModelForCausalLM": f"modeling_{name}.HybridForCausalLM"}
    return {
        "architectures": ["HybridForCausalLM"],
        "auto_map": classes,
        "model_type": name,
        "dtype": spec.dtype,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_blocks,
        "layer_types": layer_types(spec),
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.trunk.tie_embeddings,
        "use_cache": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
    }


def generation(end_id: int | None, pad_id: int | None = None) -> dict[str, Any]:
    """generation_config.json; the id that ends documents pads where there is no other."""
    ids = {"bos": end_id, "eos": end_id, "pad": end_id if pad_id is None else pad_id}
    given = {} if end_id is None else {f"{role}_token_id": token for role, token in ids.items()}
    return {"_from_model_config": False, **given}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one configuration file."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def _save_weights(spec: ModelSpec, weights: Mapping[str, Tensor] | Literal["init"], path: Path) -> Mapping[str, Tensor]:
    """Check them against the search model, save them by transformers' names, and return them."""
    from safetensors.torch import save_file

    weights = fitting(spec, weights)
    tensors = {name: tensor.contiguous() for name, tensor in hub_state(spec, weights).items()}
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(path.with_name("config.json").stat().st_mode)  # safetensors makes it private
    return weights


def fitting(spec: ModelSpec, weights: Mapping[str, Tensor] | Literal["init"]) -> dict[str, Tensor]:
    """The weights in the model's dtype, `init` as fresh ones; raises ExportError if they are not this model's."""
    import torch

    from archsearch.model import HybridLM, build_model

    dtype = getattr(torch, spec.dtype)
    if weights == "init":
        weights = build_model(spec, seed=0, dtype=dtype).state_dict()
    with torch.device("meta"):
        known = HybridLM(spec).state_dict()
    shared = shared_names(spec, known)
    wrong = [f"{name} is not one of its tensors" for name in weights if name not in known]
    wrong += [f"{name} is missing" for name in known if name not in shared and name not in weights]
    wrong += [
        f"{name} is {list(tensor.shape)} and not {list(known[name].shape)}"
        for name, tensor in weights.items()
        if name in known and tensor.shape != known[name].shape
    ]
    if wrong:
        raise ExportError(f"the weights do not fit the model: {', '.join(wrong[:3])}")
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
