"""Exported code with Triton kernels, from archsearch_kernels or copied into the folder: the same numbers as without."""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_process import run_bare
from export_models import CONV, DENSE, FULL, mixer, model

from archsearch.architecture import Block
from archsearch.export import export_model
from archsearch.export.kernels import Kernels, flat, operations
from archsearch.export.vendor import reachable, vendored
from archsearch.model import build_model
from archsearch_kernels.tuner.identity import code_hash
from archsearch_kernels.tuner.lookup import shipped

GDN = mixer("gated_deltanet", head_dim=16)
TINY = model(Block(CONV, DENSE), Block(GDN, DENSE), Block(FULL, DENSE), d_model=32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"

RUN = """
import importlib, logging, os, sys
from pathlib import Path

logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))

class Without:
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"No module named {name}")

tests, copied, installed = sys.argv[1:]
ours = [p for p in sys.path if (Path(p) / "archsearch_kernels").is_dir() and not (Path(p) / "torch").is_dir()]
sys.path[:] = [p for p in sys.path if p not in ours and not (Path(p) / "archsearch" / "cli.py").is_file()]
no_ours, no_triton = Without("archsearch", "archsearch_kernels"), Without("triton")
sys.meta_path[:0] = [no_ours, no_triton]
os.environ["ARCHSEARCH_KERNELS"] = "reference"

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
tokens = torch.randint(60, (2, 21), generator=torch.Generator().manual_seed(0))
padded = torch.ones_like(tokens)
padded[1, :5] = 0

# from a repository's cache, where every file is fetched and checked by itself, on a machine without Triton
fetched = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)
plain = fetched(tokens, use_cache=False).logits
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
sys.meta_path.remove(no_triton)

sys.path.append(tests)
import triton_interpreter

def use(folder, launch_of):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    launch = importlib.import_module(launch_of(type(model).__module__))
    found = {}
    for way in ("reference", "auto"):
        os.environ["ARCHSEARCH_KERNELS"] = way
        model.zero_grad()
        with launch.recording() as launches:
            out = model(tokens, labels=tokens, use_cache=False)
            out.loss.backward()
            new = model.generate(tokens, attention_mask=padded, max_new_tokens=3, do_sample=False, pad_token_id=0)
        names = {made.kernel.name for made in launches}
        found[way] = (out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}, new, names)
    (logits, grads, new, none), (logits_, grads_, new_, names) = found["reference"], found["auto"]
    assert not none
    torch.testing.assert_close(logits, plain.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(new_, new)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_[name], grad, atol=2e-5 * float(grad.abs().max()), rtol=1e-5, msg=name)
    print(*sorted(names))

use(copied, lambda module: module.rpartition(".")[0] + ".kernels_launch")
assert not [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
sys.meta_path.remove(no_ours)
sys.path += ours
use(installed, lambda module: "archsearch_kernels.launch")
assert "archsearch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, gradients, greedy tokens of a padded batch: fetched, copied, installed, each against torch alone."""
    monkeypatch.setattr("archsearch.export.hf.parity.GREEDY", 8)
    state = build_model(TINY, seed=1).state_dict()
    ways: tuple[Kernels, ...] = ("vendored", "installed")
    given: Any = {"weights": state, "name": "tiny", "format": "hf"}
    folders = [export_model(TINY, tmp_path / way, kernels=way, **given) for way in ways]
    cached = tmp_path / "cache" / "hub" / "models--me--tiny"
    shutil.copytree(folders[0], cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    said = run_bare(RUN, Path(__file__).parent, *folders, cache=tmp_path / "cache").splitlines()
    whose = ("this folder", "archsearch_kernels")
    told = "tiny runs the Triton kernels of {} (ARCHSEARCH_KERNELS=reference turns them off)"
    assert [line for line in said if "Triton" in line] == [told.format(place) for place in whose]
    launches = [set(line.split()) for line in said if "attention_forward" in line]
    assert len(launches) == 2
    assert launches[0] == launches[1]
    assert {"attention_step", "delta_rule_walk", "rope_rotate", "short_conv_token", "swiglu_backward"} <= launches[0]


def test_every_operation_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies import, nothing but each other; what was measured for a kernel holds for its copy."""
    importlib.import_module("archsearch_kernels.tuner.lookup")
    place = tmp_path / "copies"
    place.mkdir()
    (place / "__init__.py").write_text("")
    texts = vendored(operations().values())
    for name, text in texts.items():
        (place / name).write_text(text)
    origins = {f"{flat(m)}.py": m for m in reachable([*operations().values(), "archsearch_kernels.dispatch"])}
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in texts.items():
        if name.endswith(".py"):
            copy = importlib.import_module(f"copies.{name[:-3]}")
            assert text.startswith("# From archsearch "), name
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            assert not [node for node in nodes if (node.module or "").startswith("archsearch")], name
            importlib.import_module(origins.get(name, "archsearch_kernels"))  # a generated file has none
            assert copy.__name__.startswith("copies.")
    copied, ours = sys.modules["copies.kernels_launch"], importlib.import_module("archsearch_kernels.launch")
    used_here = {n: k for n, k in ours.KERNELS.items() if k.python.__module__.startswith("archsearch_kernels.")}
    assert copied.KERNELS.keys() == used_here.keys()
    for name, kernel in copied.KERNELS.items():
        assert code_hash(kernel.python) == code_hash(used_here[name].python), name
    found = sys.modules["copies.kernels_tuner_lookup"].shipped()
    for slug, rows in shipped().items():
        assert [str(row.identity) for row in found[slug]] == [str(r.identity) for r in rows if r.kernel in used_here]
    assert texts["LICENSE.kernels"] == (Path(__file__).parents[1] / "LICENSE").read_text()
