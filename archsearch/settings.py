"""The sections of space.yaml that are not architecture: task, train, search, objectives, runtime.

Each is a frozen spec with the defaults written here and nowhere else.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from archsearch.contract import Spec
from archsearch.quantity import Bytes, Count, Number, Seconds, parse_number

VAL_TOKENS = 262_144  # enough to judge by; more costs time and tells little


class Task(Spec):
    """What a trial is trained and judged on.

    corpus: `builtin` (sources of the running Python's standard library), `shakespeare`, or files, folders, globs.
    tokenizer: `bytes`, or the path of a tokenizer.json.
    isolate_documents: packed documents of one row do not see each other.
    """

    kind: Literal["causal_lm"] = "causal_lm"  # predict the next token
    corpus: str = "builtin"
    tokenizer: str = "bytes"
    isolate_documents: bool = False


class Train(Spec):
    """How a trial is trained; any value may be a hole.

    lr is the rate at d_model 256; other widths follow by the rule of docs/design/0003-width.md.
    schedule: wsd (warm up, stay, decay over the last `decay` of the tokens), cosine, or constant after the warm-up.
    val_tokens: left out, as many as are trained on and at most 262,144.
    """

    tokens: Annotated[Count, Field(ge=1)] = 4_000_000  # of one trial
    batch_tokens: Annotated[Count, Field(ge=1)] = 8192  # of one step, taken in whole rows of the context
    optimizer: Literal["adamw"] = "adamw"  # AdamW (1711.05101)
    lr: Annotated[Number, Field(gt=0)] = 2e-3  # the highest learning rate, at d_model 256
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05  # fraction of the tokens
    decay: Annotated[Number, Field(ge=0, le=1)] = 0.2  # fraction of the tokens
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1  # of matrices; nothing else decays
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9  # memory of the mean of the gradients
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95  # memory of the mean of their squares
    grad_clip: Annotated[Number, Field(gt=0)] = 1.0  # largest norm of all gradients together
    val_tokens: Annotated[Count, Field(ge=1)] = VAL_TOKENS
    seed: Annotated[int, Field(ge=0)] = 0  # of the weights and of the order of the batches

    @model_validator(mode="after")
    def _judge_no_more_than_is_trained_on(self) -> Self:
        if "val_tokens" not in self.model_fields_set:
            object.__setattr__(self, "val_tokens", min(self.tokens, VAL_TOKENS))
        return self

    @model_validator(mode="after")
    def _warm_up_before_the_decay(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1 + 1e-9:
            raise ValueError(
                f"warmup {self.warmup:g} and decay {self.decay:g} overlap; expected fractions of the tokens that "
                "add up to 1 at most"
            )
        return self

    def step_tokens(self, context: int) -> int:
        """Tokens of one step: whole rows of `context`, as many as batch_tokens holds, and at least one."""
        return max(1, self.batch_tokens // context) * context


def _fraction(value: object) -> float:
    number = parse_number(value)
    if not 0 < number <= 1:
        raise ValueError(f"found {value!r}; expected a fraction in (0, 1] such as 1/4")
    return float(Fraction(number).limit_denominator(10**6))


Portion = Annotated[float, BeforeValidator(_fraction)]


class Search(Spec):
    """How candidates are chosen.

    rungs: fractions of train.tokens at which a trial stops and only the best `keep` share goes on.
    seeds: how often the first baseline is trained, with seeds of its own; their spread is the noise of quality.
    """

    sampler: Literal["auto", "tpe", "nsga2", "nsga3", "random", "gp"] = "auto"  # what proposes the next candidate
    trials: Annotated[Count, Field(ge=1)] = 64  # candidates that are run, baselines not counted
    rungs: tuple[Portion, ...] = (1.0,)
    keep: Portion = 1 / 3  # share of the trials at a rung that goes on
    seed: Annotated[int, Field(ge=0)] = 0  # of the sampler
    seeds: Annotated[int, Field(ge=1)] = 1
    baselines: tuple[str, ...] = ()  # recipes that are trained first and stand beside the candidates

    @model_validator(mode="after")
    def _seeds_need_a_baseline(self) -> Self:
        if self.seeds > 1 and not self.baselines:
            raise ValueError(f"seeds {self.seeds} needs a baseline to train with them; add baselines: [transformer]")
        return self

    @model_validator(mode="after")
    def _rungs_rise_to_one(self) -> Self:
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[-1] != 1.0:
            raise ValueError(f"rungs {list(self.rungs)} must rise and end at 1")
        return self


class Workload(Spec):
    """Where an objective is read: at which scale, with how many tokens of context and sequences at once, and of
    measured ones on which device: Ray's name of the GPU (H100), or a custom resource of the nodes that have it.
    """

    scale: Literal["proxy", "target"] | None = None  # None: the objective's own default
    context: Annotated[Count, Field(ge=1)] | None = None  # None: the scale's context
    batch: Annotated[Count, Field(ge=1)] = 1  # sequences at once
    device: str | None = None  # None: one kind for the whole study


class Goal(Spec):
    """One axis of the front: a name of `archsearch.objectives`, a direction, a workload, perhaps a limit.

    limit: a bound in the objective's unit, or with its own (50 ms, 1 GiB, 20M); beyond it an architecture is
    infeasible and is not trained.
    """

    name: str  # one of those below, or a plug-in's
    goal: Literal["min", "max"] | None = None  # None: the objective's own direction
    at: Workload = Workload()  # where it is read
    limit: Number | None = None


class Runtime(Spec):
    """What the machine, or the cluster, may be asked for.

    tries: how often a trial is started whose worker dies; a lost node is not the trial's fault and does not count.
    Of runner `ray` (docs/ray.md), a trial takes a part of a node; fractions of a GPU share it. accelerator: the
    kind of GPU by Ray's name, such as H100; storage: where checkpoints travel (a path or an fsspec URL; None: all nodes
    see the run folder).
    """

    runner: Literal["local", "ray"] = "local"  # processes of this machine, or a Ray cluster
    workers: Annotated[int, Field(ge=1)] | None = None  # None: one per GPU, or one per two CPU cores
    threads: Annotated[int, Field(ge=1)] | None = None  # CPU threads of a worker; None: cores / workers
    device: str | None = None  # None: cuda where there is one, else cpu
    trial_timeout: Seconds | None = None  # a trial that takes longer is infeasible; left out: none
    memory_limit: Bytes | None = None  # address space of a worker on the CPU
    latency_repeats: Annotated[int, Field(ge=3)] = 20  # timings of which the median is the value
    tune: Literal["off", "cached", "quick", "full"] = "quick"  # of kernels on CUDA; ARCHSEARCH_TUNE goes before it
    tune_budget: Seconds = 60.0  # for the whole study
    keep_checkpoints: Literal["front", "all", "none"] = "front"  # whose weights stay; baselines count to the front
    tries: Annotated[int, Field(ge=1)] = 2
    address: str | None = None  # of the cluster; None: one on this machine
    gpus_per_trial: Annotated[Number, Field(ge=0)] | None = None  # None: 1 on cuda, 0 on the CPU
    cpus_per_trial: Annotated[Number, Field(ge=0)] | None = None  # None: as many as `threads`, or 1
    memory_per_trial: Bytes | None = None  # of a node's memory, as Ray counts it; left out: not asked for
    resources: dict[str, Annotated[Number, Field(gt=0)]] = Field(default={})  # custom resources of the nodes
    accelerator: str | None = None
    storage: str | None = None

    @field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"found {device!r}; expected cpu, cuda or cuda:<index>")
        return device
