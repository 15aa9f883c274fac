"""On a GPU: an exported folder with its own kernels, loaded by transformers in bf16, against the same without them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import DENSE, mixer, model
from test_export_hf import run_bare

from archsearch.architecture import Block
from archsearch.export import export_model
from archsearch.model import build_model
from archsearch_kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]
KINDS = {
    "short_conv": {},
    "gated_deltanet": {"head_dim": 64},
    "attention": {"head_dim": 64, "kv_groups": 2, "window": 32, "qk_norm": True},
    "mamba2": {},
    "gla": {},
}
HYBRIDS = [("short_conv", "gated_deltanet", "attention"), ("attention", "mamba2", "gla")]

RUN = """
import os, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("archsearch", "archsearch_kernels"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Nothing())
import torch
from transformers import AutoModelForCausalLM

folder, compiled = sys.argv[1:]
torch.manual_seed(0)
tokens = torch.randint(64, (2, 96), device="cuda")
padded = torch.ones_like(tokens)
padded[1, :17] = 0

def off_by(found, exact):
    return float((found.double() - exact.double()).square().mean().sqrt() / exact.double().square().mean().sqrt())

def step(dtype, way):
    os.environ["ARCHSEARCH_KERNELS"] = way
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, device_map=None).cuda()
    out = model.train()(tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    return model.eval(), out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}

_, exact, exact_grads = step(torch.float32, "reference")
_, logits, grads = step(torch.bfloat16, "reference")
model, logits_, grads_ = step(torch.bfloat16, "auto")
assert model.device.type == "cuda" and model.dtype == torch.bfloat16
assert off_by(logits_, exact) <= max(3 * off_by(logits, exact), 8e-3), (off_by(logits_, exact), off_by(logits, exact))
for name, grad in exact_grads.items():
    torch_, ours = off_by(grads[name], grad), off_by(grads_[name], grad)
    assert ours <= max(3 * torch_, 3e-2), (name, ours, torch_)
print("logits", off_by(logits_, exact), "torch", off_by(logits, exact))

wide = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).cuda().eval()
launch = sys.modules[type(model).__module__.rpartition(".")[0] + ".kernels_launch"]
with torch.no_grad():
    for way in ("auto", "reference"):
        os.environ["ARCHSEARCH_KERNELS"] = way
        ways = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        with launch.recording() as launches:
            new = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), **ways)
            both = model.generate(tokens, attention_mask=padded, **ways)
        assert bool(launches) == (way == "auto")
        os.environ["ARCHSEARCH_KERNELS"] = "reference"
        logits = wide(new, use_cache=False).logits[0, tokens.shape[1] - 1 : -1]
        gaps = logits.amax(-1) - logits.gather(-1, new[0, tokens.shape[1] :, None])[:, 0]
        assert new.shape == (1, 128) and both.shape == (2, 128)
        assert float(gaps.max()) <= 0.1 * float(logits.std()), (way, gaps)  # as likely as bf16 can tell
        print("generate", way, float(gaps.max()))

if compiled == "compiled":
    os.environ["ARCHSEARCH_KERNELS"] = "auto"
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        found = torch.compile(model, fullgraph=True)(tokens, use_cache=False).logits
    assert off_by(found, wanted) <= 2e-2, off_by(found, wanted)
    print("compiled")
"""


@pytest.mark.parametrize("kinds", HYBRIDS, ids="-".join)
def test_copied_kernels_on_a_gpu(kinds: tuple[str, ...], tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = KINDS
    blocks = [Block(mixer(kind, **options[kind]), DENSE) for kind in kinds]
    spec = model(*blocks, d_model=256, dtype="bfloat16")
    weights = build_model(spec, seed=3, dtype=torch.bfloat16).state_dict()
    out = export_model(spec, tmp_path / "out", weights=weights, name="mine", format="hf", kernels="vendored")
    found = re.search(
        r"With Triton kernels on .* its logits are (\S+) off in bfloat16", (out / "README.md").read_text()
    )
    assert found is not None
    (tmp_path / "cache").mkdir()
    said = run_bare(RUN, out, "compiled" if kinds == HYBRIDS[0] else "eager", cache=tmp_path / "cache")
    print(said)
    assert "generate reference" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_with_installed_kernels(dtype: str, tmp_path: Path) -> None:
    """The comparison at export runs the kernels; the card says so."""
    spec = model(*[Block(mixer(k, **KINDS[k]), DENSE) for k in HYBRIDS[0]], d_model=256, dtype=dtype)
    out = export_model(spec, tmp_path / "out", name="mine")
    assert f"off in {dtype}, torch alone" in (out / "README.md").read_text()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_kernel_runs_where_its_operands_are() -> None:
    """As a model does that is spread over several devices while the first is the current one."""
    gate, up = torch.randn(2, 64, 256, device="cuda:1").unbind()
    assert torch.cuda.current_device() == 0
    found = swiglu(gate, up, implementation="triton")
    torch.testing.assert_close(found, swiglu(gate, up, implementation="reference"))
