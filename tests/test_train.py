"""The training loop: it learns, stops and goes on, reports what went wrong, and keeps one learning rate per width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from example_training import VOCAB_SIZE, ExampleCorpus, example_model, example_settings, example_spec
from torch import Tensor, nn

from archsearch.errors import DataError, NonFiniteError
from archsearch.model import BASE_WIDTH, HybridLM, width_multipliers
from archsearch.settings import Train
from archsearch.tasks import TASKS, TensorBatch, causal_lm
from archsearch.train import CURVE_POINTS, Plan, TrainResult, evaluate, make_optimizer, schedule, to_device, train

CORPUS = ExampleCorpus()


def run(model: HybridLM, settings: Train | None = None, **options: Any) -> TrainResult:
    return train(model, model.spec, CORPUS, settings or example_settings(), **{"device": "cpu", **options})


def weights(model: HybridLM) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- schedule and plan


def test_wsd_warms_up_stays_and_falls() -> None:
    shares = [schedule(Train(schedule="wsd", warmup=0.1, decay=0.3), step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10:71] == [1.0] * 61
    assert all(a > b > 0 for a, b in pairwise(shares[70:]))
    assert shares[85] == pytest.approx(1 - math.sqrt(0.5))


def test_cosine_and_constant() -> None:
    cosine = [schedule(Train(schedule="cosine", warmup=0.0), step, 100) for step in range(100)]
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert 0 < cosine[99] < 1e-3
    assert {schedule(Train(schedule="constant", warmup=0.0), step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_the_shortest_schedules_never_reach_zero(name: Any, total: int) -> None:
    settings = Train(schedule=name, warmup=0.5, decay=0.5)
    assert all(0 < schedule(settings, step, total) <= 1 for step in range(total))


def test_the_plan_rounds_up_to_whole_batches() -> None:
    plan = Plan.of(example_settings(tokens=1000, batch_tokens=100), context=16)
    assert (plan.batch_size, plan.tokens_per_step, plan.total_steps) == (6, 96, 11)
    assert [plan.steps(tokens) for tokens in (1, 96, 97, 10**9)] == [1, 1, 2, 11]
    assert Plan.of(example_settings(batch_tokens=1), context=16).batch_size == 1


# --- the loop


def test_it_learns_and_says_how_far_it_is() -> None:
    model, seen = example_model(), []
    settings = example_settings(tokens=100 * 64)
    before = evaluate(model, model.spec, CORPUS, settings, device="cpu")
    result = run(model, settings, on_step=lambda *progress: seen.append(progress))
    after = evaluate(model, model.spec, CORPUS, settings, device="cpu")
    assert before["val_loss"] == pytest.approx(math.log(VOCAB_SIZE), rel=0.5)
    assert after["val_loss"] < 2.5 < math.log(VOCAB_SIZE)  # the automaton's own entropy is 0.6
    assert after["val_bpb"] == pytest.approx(after["val_loss"] / math.log(2) / 2)  # its symbols count two bytes each
    assert after["val_tokens"] == 256
    assert (result.steps, result.tokens, result.finished) == (100, 100 * 64, True)
    assert result.tokens_per_s > 0
    assert result.peak_memory_bytes > 0
    assert [step for step, _, _ in seen] == list(range(1, 101))
    assert len(result.curve) <= CURVE_POINTS
    assert result.curve[-1] == seen[-1][1:]
    assert set(result.curve) <= {(tokens, loss) for _, tokens, loss in seen}


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    one, again, other = example_model(), example_model(), example_model()
    run(one)
    run(again)
    run(other, example_settings(seed=1))
    assert_equal(weights(one), weights(again))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_stopping_at_rungs_changes_nothing_even_where_the_model_draws_random_numbers() -> None:
    def noisy() -> HybridLM:
        model = example_model()
        model.norm.register_forward_hook(lambda _, __, x: x + 0.1 * torch.randn_like(x))
        return model

    whole, stopped = noisy(), noisy()
    expected = run(whole)
    first = run(stopped, until_tokens=3 * 64)
    second = run(stopped, until_tokens=3 * 64, resume=first.checkpoint)  # nothing left to do
    third = run(stopped, until_tokens=7 * 64, resume=second.checkpoint)
    last = run(stopped, resume=third.checkpoint)
    assert_equal(weights(whole), weights(stopped))
    assert last.curve == expected.curve
    assert (first.steps, second.steps, third.steps, last.steps) == (3, 3, 7, 12)
    assert second.tokens_per_s == first.tokens_per_s
    assert (third.finished, last.finished) == (False, True)


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    run(example_model(), until_tokens=64)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_ends_the_training_with_its_step() -> None:
    model = example_model()
    calls = iter(range(1, 100))
    model.norm.register_forward_hook(lambda _, __, x: x * math.nan if next(calls) == 4 else x)
    with pytest.raises(NonFiniteError, match="loss became non-finite at step 4") as error:
        run(model)
    assert error.value.step == 4


def test_a_gradient_that_is_not_finite_ends_the_training_with_its_step() -> None:
    model = example_model()
    calls = iter(range(1, 100))
    model.norm.weight.register_hook(lambda grad: grad * math.inf if next(calls) == 2 else grad)
    with pytest.raises(NonFiniteError, match="gradient norm became non-finite at step 2"):
        run(model)


class Recorder:
    def __init__(self) -> None:
        self.held = False
        self.entered = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        assert not self.held
        self.held = True
        self.entered += 1
        yield
        self.held = False


def test_the_lock_is_held_around_each_step_and_nothing_else() -> None:
    lock, model, held = Recorder(), example_model(), []
    model.norm.register_forward_pre_hook(lambda *_: held.append(lock.held))
    run(model, lock=lock, on_step=lambda *_: held.append(not lock.held))
    assert lock.entered == 12
    evaluate(model, model.spec, CORPUS, example_settings(), device="cpu", lock=lock)
    assert lock.entered == 12 + 4
    assert len(held) == 12 * 2 + 4
    assert all(held)
    assert not lock.held


class FakeRouter(nn.Module):
    """Stands in for a mixture of experts: a loss of its own and a bias that is balanced after each step."""

    def __init__(self, norm: nn.RMSNorm, router_loss: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("bias", torch.zeros(()))
        self.has_loss = router_loss
        self.router_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.router_loss = 3 * self.weight.sum() if self.has_loss else None
        return F.rms_norm(x, x.shape[-1:])

    def update_bias(self) -> None:
        self.bias += 1


@pytest.mark.parametrize("router_loss", [True, False])
def test_routers_add_their_loss_and_update_their_bias(router_loss: bool) -> None:
    model = example_model()
    model.norm = router = FakeRouter(model.norm, router_loss)  # whose weight is then used for nothing else
    grads: list[float] = []
    router.weight.register_hook(lambda grad: grads.append(grad.mean().item()))
    result = run(model)
    assert grads == ([3.0] * 12 if router_loss else [])
    assert router.bias == 12
    assert all(loss < 10 for _, loss in result.curve)  # the reported loss is the task's alone; the router's is 96


# --- loss and metrics


def by_hand(model: HybridLM, tokens: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten()).item()


def test_metrics_are_means_over_tokens_whatever_the_batches() -> None:
    model = example_model()
    batches = list(CORPUS.val_batches(batch_size=100, context=16, max_tokens=256))
    expected = by_hand(model, torch.from_numpy(batches[0].inputs), torch.from_numpy(batches[0].targets))
    for batch_tokens in (16, 48, 1000):  # 48: the last batch is smaller
        settings = example_settings(batch_tokens=batch_tokens)
        measured = evaluate(model, model.spec, CORPUS, settings, device="cpu")
        assert measured["val_loss"] == pytest.approx(expected, rel=1e-6)
        assert measured["val_bpb"] == pytest.approx(expected / math.log(2) / 2, rel=1e-6)
    assert model.training
    evaluate(model.eval(), model.spec, CORPUS, settings, device="cpu")
    assert not model.training


def test_a_corpus_without_held_out_text_is_refused() -> None:
    with pytest.raises(DataError, match="no held-out text"):
        evaluate(example_model(), example_spec(), CORPUS, example_settings(val_tokens=1), device="cpu")


def test_a_large_vocabulary_is_taken_in_pieces_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = CORPUS.train_batch(0, batch_size=3, context=16, seed=0)
    tensors = TensorBatch(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), batch.target_bytes)
    losses, grads = [], []
    for at_once in (causal_lm.LOGITS_AT_ONCE, VOCAB_SIZE * 7):
        monkeypatch.setattr(causal_lm, "LOGITS_AT_ONCE", at_once)
        model = example_model().double()
        loss = TASKS.load("causal_lm")().loss(model, tensors)
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    assert losses[0].item() == pytest.approx(by_hand(model, tensors.inputs, tensors.targets), rel=1e-6)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_packed_documents_are_judged_as_if_alone() -> None:
    model = example_model()
    rows = CORPUS.train_batch(0, batch_size=1, context=16, seed=0)
    seq_idx = np.array([[0] * 5 + [1] * 11], dtype=np.int32)
    packed = to_device(replace(rows, seq_idx=seq_idx), torch.device("cpu"))
    apart = [by_hand(model, packed.inputs[:, piece], packed.targets[:, piece]) for piece in (slice(5), slice(5, 16))]
    loss = TASKS.load("causal_lm")().loss(model, packed)
    assert loss.item() == pytest.approx((5 * apart[0] + 11 * apart[1]) / 16, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_on_a_gpu_it_learns_in_bf16_and_names_the_step_that_went_wrong(
    graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_GRAPHS", graphs)
    settings = example_settings(tokens=100 * 64)
    model = example_model(device="cuda")
    first = run(model, settings, device="cuda", until_tokens=50 * 64)
    result = run(model, settings, device="cuda", resume=first.checkpoint)
    assert (result.steps, result.finished) == (100, True)
    assert evaluate(model, model.spec, CORPUS, settings, device="cuda")["val_loss"] < 2.5
    assert result.peak_memory_bytes > sum(4 * p.numel() for p in model.parameters())
    model.norm.register_buffer("calls", torch.zeros((), device="cuda"), persistent=False)  # counts in replays too
    model.norm.register_forward_hook(lambda m, _, x: torch.where(m.calls.add_(1) == 21, math.nan, x))
    with pytest.raises(NonFiniteError, match="loss became non-finite at step 21"):
        run(model, settings, device="cuda")


# --- width


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_in_blocks_follow_the_width(tied: bool) -> None:
    spec = example_spec({"kind": "attention", "head_dim": 16, "qk_norm": True}, d_model=64, tie_embeddings=tied)
    names = [name for name, _ in example_model(spec).named_parameters()]
    assert width_multipliers(spec) == {name: 4.0 if "proj" in name else 1.0 for name in names}


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_is_for_matrices_and_the_same_at_every_width(tied: bool) -> None:
    for d_model in (32, 512):
        model = example_model(example_spec(d_model=d_model, tie_embeddings=tied))
        optimizer = make_optimizer(model, example_settings(weight_decay=0.1))
        decay = {n: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]}
        assert decay.keys() == {name for name, _ in model.named_parameters()}
        for name, (scale, weight_decay) in decay.items():
            is_matrix = "proj" in name or name == "head.weight"
            assert scale == (BASE_WIDTH / d_model if "proj" in name else 1.0)
            assert scale * weight_decay == (pytest.approx(0.1) if is_matrix else 0.0), name


def test_the_first_step_moves_each_weight_by_its_own_learning_rate() -> None:
    model = example_model(example_spec(d_model=64))
    before = dict(zip(dict(model.named_parameters()), weights(model), strict=True))
    run(model, example_settings(schedule="constant", warmup=0.0, weight_decay=0.0, lr=1e-3), until_tokens=64)
    for name, factor in {"blocks.0.mixer.q_proj.weight": 4, "embed.weight": 1, "norm.weight": 1}.items():
        moved = (model.get_parameter(name).detach() - before[name]).abs()
        assert moved.median().item() == pytest.approx(factor * 1e-3, rel=0.02), name


def test_the_size_of_the_first_logits_does_not_grow_with_the_width() -> None:
    tokens = torch.from_numpy(CORPUS.train_batch(0, batch_size=8, context=16, seed=0).inputs)
    sizes = []
    for d_model in (64, 256, 1024):
        with torch.no_grad():
            sizes.append(example_model(example_spec(d_model=d_model))(tokens).std().item())
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] < 1.5


def losses_by_lr(d_model: int) -> dict[float, float]:
    """Held-out loss after a short training at each of a grid of learning rates, a factor of two apart."""
    losses = {}
    spec = example_spec({"kind": "attention", "head_dim": 16}, d_model=d_model)
    for lr in (2.0**-i for i in range(6, 10)):
        model = example_model(spec)
        settings = example_settings(tokens=24 * 128, batch_tokens=128, lr=lr, val_tokens=2000)
        run(model, settings)
        losses[lr] = evaluate(model, spec, CORPUS, settings, device="cpu")["val_loss"]
    return losses


def test_the_best_learning_rate_is_the_same_at_every_width() -> None:
    narrow, base = losses_by_lr(BASE_WIDTH // 4), losses_by_lr(BASE_WIDTH)
    best, at_base = min(narrow, key=narrow.__getitem__), min(base, key=base.__getitem__)
    assert best <= 2 * at_base
    assert at_base <= 2 * best
    assert 2.0**-6 > at_base > 2.0**-9  # the grid holds the valley


def moved_by_training(d_model: int) -> float:
    """How far eight steps at one learning rate move what the blocks add to the residual stream."""
    model = example_model(example_spec(d_model=d_model))
    tokens = torch.from_numpy(CORPUS.train_batch(99, batch_size=16, context=16, seed=1).inputs)

    @torch.no_grad()
    def added() -> Tensor:
        start = model.embed(tokens) * model.embed_scale
        x = start
        for block in model.blocks:
            x, _ = block(x)
        return x - start

    before = added()
    run(model, example_settings(tokens=8 * 128, batch_tokens=128, schedule="constant", warmup=0.0))
    return (added() - before).std().item()


def test_a_step_moves_the_activations_equally_far_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinate check of 2203.03466, appendix D.1, and that it sees a rule that is missing."""
    narrow, base = moved_by_training(BASE_WIDTH // 8), moved_by_training(BASE_WIDTH)
    assert narrow == pytest.approx(base, rel=0.25)
    monkeypatch.setattr("archsearch.model.BASE_WIDTH", BASE_WIDTH // 8)  # the narrow width becomes its own base
    assert moved_by_training(BASE_WIDTH // 8) < base / 2
