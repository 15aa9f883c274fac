"""On a CUDA device: mixers and FFNs equal themselves on the CPU, whole models are timed, a launch runs to its front."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_training import example_model
from spaces import TINY
from test_contract import FFN_VARIANTS, MIXER_VARIANTS, table
from torch import Tensor

from archsearch.architecture import ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.data import open_corpus
from archsearch.ffns import FFNS
from archsearch.latency.lock import DeviceLock, device_key
from archsearch.latency.measure import Bench
from archsearch.mixers import MIXERS
from archsearch.model import build_model
from archsearch.space import SearchSpace
from archsearch.step import GraphedStep, make_step
from archsearch.tasks import TensorBatch
from archsearch.testing import FFNContract, MixerContract
from archsearch.testing.checks import distance, is_near, packed, seeded
from archsearch.train import autocast, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAME = 2e-4  # float32 on two devices: other orders of summation, exponentials of other libraries


def both(module: Any) -> tuple[Any, Any]:
    return module, copy.deepcopy(module).to("cuda")


def run(module: Any, x: Tensor, *arguments: Tensor) -> list[tuple[str, Tensor]]:
    """Output and every gradient."""
    x = x.detach().clone().requires_grad_()
    y = module(x, *arguments)
    (y * seeded(*y.shape, seed=1).to(y)).sum().backward()
    found = [("output", y.detach()), ("gradient of x", x.grad)]
    return found + [(f"gradient of {name}", p.grad) for name, p in module.named_parameters()]


class TestMixersOnGPU:
    contract = MixerContract()

    @pytest.mark.parametrize("variant", table(MIXERS.names(), MIXER_VARIANTS), ids=str)
    @pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
    def test_equals_the_cpu(self, variant: dict[str, Any], is_packed: bool) -> None:
        _, site, module = self.contract.make(variant)
        here, there = both(module)
        x = seeded(2, 97, site.d_model)
        seq_idx = packed([[40, 1, 56], [97]]) if is_packed else None
        on_cpu = run(here, x, *([] if seq_idx is None else [seq_idx]))
        on_gpu = run(there, x.cuda(), *([] if seq_idx is None else [seq_idx.cuda()]))
        for (what, a), (_, b) in zip(on_cpu, on_gpu, strict=True):
            assert distance(b.cpu(), a) <= SAME, what

    @pytest.mark.parametrize("variant", table(MIXERS.names(), MIXER_VARIANTS), ids=str)
    def test_bf16_and_decode(self, variant: dict[str, Any]) -> None:
        """bfloat16 against float32, and a prompt then single tokens against one forward."""
        _, site, module = self.contract.make(variant)
        module = module.to("cuda").eval()
        x = seeded(2, 100, site.d_model).cuda().bfloat16()
        high = module(x.float())
        low = copy.deepcopy(module).bfloat16()
        with torch.no_grad():
            whole = low(x)
            state = low.init_state(2, 100, x.device, x.dtype)
            parts = [low.extend(x[:, :61], state, 0)]
            parts += [low.step(x[:, t : t + 1], state, t) for t in range(61, 100)]
        assert is_near(whole, high)
        assert is_near(torch.cat(parts, 1), high)


class TestFFNsOnGPU:
    contract = FFNContract()

    @pytest.mark.parametrize("variant", table(FFNS.names(), FFN_VARIANTS), ids=str)
    def test_equals_the_cpu(self, variant: dict[str, Any]) -> None:
        _, site, module = self.contract.make(variant)
        here, there = both(module)
        x = seeded(2, 97, site.d_model)
        for (what, a), (_, b) in zip(run(here, x), run(there, x.cuda()), strict=True):
            assert distance(b.cpu(), a) <= SAME, what

    @pytest.mark.parametrize("variant", table(FFNS.names(), FFN_VARIANTS), ids=str)
    def test_bf16(self, variant: dict[str, Any]) -> None:
        _, site, module = self.contract.make(variant)
        module = module.to("cuda")
        x = seeded(2, 100, site.d_model).cuda().bfloat16()
        assert is_near(copy.deepcopy(module).bfloat16()(x), module(x.float()))


def test_whole_models_are_timed_in_bf16(tmp_path: Path) -> None:
    spec = target(tmp_path)
    with Bench(spec, "cuda") as bench:
        timings = [bench.prefill(context=256), bench.decode(context=256, batch=2), bench.train_step(context=256)]
        assert all(0 < t.p10 <= t.p50 <= t.p90 for t in timings)
        weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
        assert bench.peak_memory(context=256, work="decode") > weights
        assert bench.state_bytes(context=256) > 0


def target(folder: Path) -> ModelSpec:
    path = folder / "space.yaml"
    path.write_text(TINY.replace("dtype: float32", "dtype: bfloat16"))
    return SearchSpace.load(path).sample(RandomChooser(0)).architecture.at("target")


def test_the_lock_is_of_the_card_and_not_of_its_index() -> None:
    key = device_key("cuda:0")
    assert key == device_key("cuda")
    assert str(torch.cuda.get_device_properties(0).uuid) in key
    lock = DeviceLock("cuda:0")
    with lock.shared():
        pass
    lock.close()


def test_a_launch_runs_to_its_front(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TINY.replace("name: state_bytes", "name: decode_ms"))
    command = [sys.executable, "-m", "archsearch", "launch", "space.yaml", "--trials", "2", "--workers", "2"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, "--device", "cuda"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "ARCHSEARCH_TUNE": "cached"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "runs/tiny/trials.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["status"] == "complete", record["message"]
        assert record["device"] == torch.cuda.get_device_name()


MIXED = """
archsearch: 1
name: mixed
scales:
  proxy:  {n_blocks: 8, d_model: 64, context: 128}
  target: {n_blocks: 8, d_model: 64, context: 256, vocab_size: 512, dtype: bfloat16}
mixers:
  full: {kind: attention, head_dim: 32}
  swa:  {kind: attention, head_dim: 32, window: 32}
  gdn:  {kind: gated_deltanet, head_dim: 32}
  kda:  {kind: kda, head_dim: 32}
  ssd:  {kind: mamba2, head_dim: 32, d_state: 32}
  s6:   {kind: mamba}
  conv: {kind: short_conv}
  moba: {kind: moba, head_dim: 32, block_size: 16, top_k: 3}
ffns:
  dense: {kind: swiglu}
  experts: {kind: moe, n_experts: 4, top_k: 2, routing: sigmoid}
layout:
  mixer: {pattern: [full, swa, gdn, kda, ssd, s6, conv, moba]}
  ffn: {pattern: [dense, experts]}
objectives: [{name: val_bpb}]
train: {tokens: 20480, batch_tokens: 1024, val_tokens: 1024, lr: 3e-3}
search: {trials: 1, baselines: []}
"""


def test_training_is_replayed_as_a_graph_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "space.yaml").write_text(MIXED)
    space = SearchSpace.load(tmp_path / "space.yaml")
    candidate = space.sample(RandomChooser(0))
    spec, corpus = candidate.architecture.at("proxy"), open_corpus(space.task, tmp_path)
    graphs: list[GraphedStep] = []
    kept = GraphedStep._capture
    monkeypatch.setattr(GraphedStep, "_capture", lambda self, batch: graphs.append(self) or kept(self, batch))
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        monkeypatch.setenv("ARCHSEARCH_GRAPHS", mode)
        model = build_model(spec, 0, "cuda", torch.float32)
        seen = losses[mode] = []
        train(model, spec, corpus, candidate.train, device="cuda", on_step=lambda *told, to=seen: to.append(told[2]))
    assert [step.graphed for step in graphs] == [True]
    assert len(losses["on"]) == 20
    assert losses["on"][-1] < losses["on"][0] - 0.5
    assert losses["on"] == pytest.approx(losses["off"], rel=5e-3)


def test_what_cannot_be_captured_trains_from_python(caplog: pytest.LogCaptureFixture) -> None:
    class Waits:
        def loss(self, model: Any, batch: TensorBatch) -> Tensor:
            hidden = model.hidden(batch.inputs).float()
            return hidden.square().mean() * (1.0 if hidden.sum().item() < 1e30 else 2.0)

    model = example_model().cuda()
    batch = TensorBatch(torch.ones(2, 16, dtype=torch.long, device="cuda"), torch.ones(2, 16), 32)
    step = make_step(model, Waits(), 1.0, autocast(torch.device("cuda")), torch.device("cuda"))
    for _ in range(3):
        assert step(batch).isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        step.clear()
    assert "training runs from Python, not as a CUDA graph" in caplog.text
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is not left in the capture
