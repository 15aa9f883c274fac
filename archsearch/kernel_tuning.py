"""Tunes exactly the kernels that a space can launch: every distinct block, at both scales, in each kind of work.

A block is tuned alone, as a model of one block: what it launches in training at proxy scale and in the measurements
at target scale is what the candidates of the space will launch. The numbers that a configuration must reproduce are
those of the reference in float32; it may be off by a few times what the reference itself is off in the model's dtype.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from archsearch.architecture import Block, ModelSpec
from archsearch.choosers import drawn
from archsearch.errors import RunError
from archsearch.objectives import objective, scale_of
from archsearch.quantity import parse_seconds
from archsearch.recipes import baselines
from archsearch.space import Candidate, SearchSpace
from archsearch.tasks import TASKS

MAX_SAMPLES = 400
SAMPLE_SECONDS = 2.0
CHECKED_TOKENS = 300  # longer than any chunk, and a multiple of none
LEAST_ERROR, TIMES_REFERENCE = 0.02, 4.0

Work = Literal["train", "judge", "prefill", "decode", "train_step"]
MEASURES: dict[str, Work] = {"prefill_ms": "prefill", "decode_ms": "decode", "train_step_ms": "train_step"}


@dataclass(frozen=True)
class BlockWork:
    """One block as a model, and what is done with it."""

    model: ModelSpec
    work: Work
    context: int
    batch: int

    def arguments(self) -> dict[str, Any]:
        """Plain data for `workload`."""
        return {"model": self.model.to_json(), "work": self.work, "context": self.context, "batch": self.batch}

    def name(self) -> str:
        """For people."""
        block = self.model.blocks[0]
        return f"{self.work} {block.mixer.kind}+{block.ffn.kind} d{self.model.d_model} {self.batch}x{self.context}"


@dataclass(frozen=True)
class Tuned:
    """What a tuning did: launches tuned, rows written, launches (or blocks) that the budget did not reach."""

    blocks: int
    tuned: int
    rows: int
    left: int
    seconds: float
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """One line, and one per failure."""
        left = f", {self.left} left for want of time" if self.left else ""
        failed = "".join(f"\n  failed: {failure}" for failure in self.failures)
        return f"{self.blocks} blocks, {self.tuned} launches tuned in {self.seconds:.0f} s{left}{failed}"


def tune(
    spaces: Sequence[SearchSpace],
    budget: float | str | None = None,
    *,
    full: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Tune what these spaces launch on the current CUDA device, at most `budget` (seconds, or text such as `60s`).

    What a table already knows is not timed again. Raises RunError where there is no CUDA device or no Triton.
    """
    from archsearch_kernels.tuner import search
    from archsearch_kernels.tuner.session import tune_jobs
    from archsearch_kernels.tuner.workload import Job

    try:
        seconds = None if budget is None else parse_seconds(budget)
    except ValueError as problem:
        raise RunError(f"budget: {problem}") from problem
    _need_device()
    works = [work for space in spaces for work in block_works(space)]
    jobs = [Job("archsearch.kernel_tuning:workload", work.arguments(), work.name(), _code(work)) for work in works]
    done = tune_jobs(jobs, budget=seconds, limit=search.FULL if full else search.QUICK, say=say)
    for failure in done.failures:
        say(f"failed: {failure}")
    return Tuned(len(jobs), done.tuned, done.rows, done.left, done.seconds, tuple(done.failures))


def explain(spaces: Sequence[SearchSpace]) -> list[tuple[str, str]]:
    """Each launch of these spaces with the configuration it runs in and where that comes from.

    Raises RunError where there is no CUDA device or no Triton.
    """
    from archsearch_kernels.launch import recording
    from archsearch_kernels.tuner import lookup

    _need_device()
    found: dict[Any, tuple[str, str]] = {}
    for work in (work for space in spaces for work in block_works(space)):
        run = workload(**work.arguments()).run
        with recording() as made:
            run()
        for launch in made:
            candidates = launch.kernel.configs(launch.arguments)
            answer = lookup.explain(launch.kernel, launch.key, candidates)
            config, source = (answer.config, answer.source) if answer else (candidates[0], "default")
            sizes = " ".join(f"{name}<={size}" for name, size in launch.key.bucket)
            options = " ".join(f"{name}={value}" for name, value in config.items())
            found.setdefault(launch.key, (f"{launch.kernel.name} {sizes}", f"{options} ({source})"))
    return list(found.values())


def export_pack(path: Path) -> int:
    """Write this user's measurements of the current device as a pack; returns the number of rows. Raises RunError."""
    from archsearch_kernels.tuner.identity import device
    from archsearch_kernels.tuner.packs import export_table

    _need_device()
    return export_table(device(), path)


def import_pack(path: Path) -> int:
    """Add a pack to this user's tables; returns the number of rows. Raises RunError if it is none."""
    from archsearch_kernels.tuner import packs

    try:
        return packs.import_pack(path)
    except ValueError as problem:
        raise RunError(str(problem)) from problem


def _need_device() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RunError("tuning needs a CUDA device, and there is none here; export a pack where there is one")
    if find_spec("triton") is None:
        raise RunError("tuning needs triton: pip install 'archsearch[triton]'")


def block_works(space: SearchSpace, candidates: list[Candidate] | None = None) -> list[BlockWork]:
    """The distinct block works of a space, those that most candidates have first.

    candidates: whose blocks; by default as many random ones as two seconds give, and the baselines.
    """
    found: Counter[str] = Counter()
    works: dict[str, BlockWork] = {}
    for candidate in candidates if candidates is not None else _samples(space):
        for work in _works(space, candidate):
            key = json.dumps(_canonical(work), sort_keys=True)
            found[key] += 1
            works.setdefault(key, work)
    return [works[key] for key, _ in found.most_common()]


def _samples(space: SearchSpace) -> list[Candidate]:
    end = time.monotonic() + SAMPLE_SECONDS
    seeds = takewhile(lambda seed: time.monotonic() <= end, range(MAX_SAMPLES))
    return [*baselines(space), *drawn(space, seeds)]


def _works(space: SearchSpace, candidate: Candidate) -> list[BlockWork]:
    proxy = candidate.architecture.at("proxy")
    rows = max(1, candidate.train.batch_tokens // proxy.context)
    asked: list[tuple[ModelSpec, Work, int, int]] = []
    if any(objective(goal).stage == "trained" for goal in space.objectives):
        asked += [(proxy, "train", proxy.context, rows), (proxy, "judge", proxy.context, rows)]
    for goal in space.objectives:
        if goal.name in MEASURES:
            model = candidate.architecture.at(scale_of(goal))
            asked.append((model, MEASURES[goal.name], goal.at.context or model.context, goal.at.batch))
    return [
        BlockWork(replace(model, blocks=(_alone(block),)), work, context, batch)
        for model, work, context, batch in asked
        for block in model.blocks
    ]


def _alone(block: Block) -> Block:
    return replace(block, kv_from=None, mixer_weights_from=None, ffn_weights_from=None)


def _code(work: BlockWork) -> str:
    """A digest of the code that makes the work's model; empty if plug-ins are part of it."""
    from archsearch_kernels.tuner.finished import source_digest

    ours = work.model.blocks[0].is_built_in and work.model.task in TASKS.table
    return source_digest(Path(__file__).parent) if ours else ""


def _canonical(work: BlockWork) -> dict[str, Any]:
    data = work.arguments()
    blocks = [{k: v for k, v in b.items() if not k.endswith("_name")} for b in data["model"]["blocks"]]
    return {**data, "model": {**data["model"], "blocks": blocks}}


def workload(model: Mapping[str, Any], work: Work, context: int, batch: int) -> Any:
    """The work on the current CUDA device, for a timing process (see archsearch_kernels.tuner.workload)."""
    import torch

    from archsearch.model import build_model
    from archsearch_kernels.dispatch import using
    from archsearch_kernels.tuner.workload import Workload, distance

    spec = ModelSpec.from_json(model)
    dtype = torch.float32 if work in ("train", "judge") else getattr(torch, spec.dtype)
    built = build_model(spec, 0, "cuda", dtype)
    small = min(CHECKED_TOKENS, context)

    @cache
    def truth() -> Mapping[str, Any]:
        with using("reference"):
            return _numbers(build_model(spec, 0, "cuda", torch.float32), work, small, exact=True)

    @cache
    def tolerance() -> Mapping[str, float]:
        with using("reference"):
            rounded = _numbers(built, work, small)
        return {n: max(LEAST_ERROR, TIMES_REFERENCE * distance(rounded[n], x)) for n, x in truth().items()}

    return Workload(_runner(built, work, context, batch), lambda: _numbers(built, work, small), truth, tolerance)


def _runner(model: Any, work: Work, context: int, batch: int) -> Callable[[], object]:
    """The work at the size that counts."""
    import torch

    from archsearch.tasks import TensorBatch
    from archsearch.train import autocast

    tokens = torch.randint(model.spec.vocab_size, (batch, context + 1), device="cuda")
    if work in ("train", "judge", "train_step"):
        rows = TensorBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1)
        task = TASKS.load(model.spec.task)()

        def train() -> None:
            with torch.set_grad_enabled(work != "judge"), autocast(tokens.device, enabled=work != "train_step"):
                loss = task.loss(model, rows)
            if work != "judge":
                loss.backward()
                model.zero_grad()

        return train

    def serve() -> None:
        with torch.inference_mode():
            state = model.init_state(batch, context)
            if work == "decode":
                state.position = context - 1
            model.extend(tokens[:, : 1 if work == "decode" else context], state, last_only=True)

    return serve


def _numbers(model: Any, work: Work, n_tokens: int, exact: bool = False) -> dict[str, Any]:
    """Hidden activations and gradients at a small ragged size; for serving, the logits of a prompt and of a step.

    exact: without autocast.
    """
    import torch

    from archsearch.train import autocast

    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(model.spec.vocab_size, (2, n_tokens), device="cuda", generator=generator)
    if work in ("prefill", "decode"):
        with torch.inference_mode():
            state = model.init_state(2, n_tokens)
            prompt = model.extend(tokens[:, :-1], state)
            return {"prompt": prompt.float(), "step": model.extend(tokens[:, -1:], state).float()}
    model.zero_grad()
    lowered = work != "train_step" and not exact
    with torch.set_grad_enabled(work != "judge"), autocast(tokens.device, enabled=lowered):
        hidden = model.hidden(tokens)
    found = {"hidden": hidden.detach().float()}
    if work != "judge":
        hidden.backward(torch.randn(hidden.shape, device="cuda", generator=generator).to(hidden.dtype))
        found |= {name: p.grad.detach().float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found
