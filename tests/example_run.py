"""A made-up study: what a run folder holds after 27 trials, for tests of everything that works from the folder alone.

Architectures of attention and SwiGLU are real; the others are plain dicts, some of kinds that do not exist, because the
report must read any record.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from archsearch.architecture import Architecture, Block, ModelSpec, identity, parse_ffn, parse_mixer
from archsearch.store import Measured, RunFolder, TrialRecord

SETTINGS: dict[str, Any] = {
    "name": "linear-sparse-full",
    "description": "Where does a 48-block model need full attention, and where does MoE pay?",
    "objectives": [
        {"name": "val_bpb", "goal": "min", "unit": "bits/byte", "scale": "proxy", "context": 512, "batch": 1},
        {
            "name": "decode_ms",
            "goal": "min",
            "unit": "ms",
            "scale": "target",
            "context": 32768,
            "batch": 1,
            "limit": 90.0,
        },
    ],
    "search": {"sampler": "tpe", "trials": 27, "rungs": [1.0], "keep": 1 / 3, "seed": 0, "baselines": ["transformer"]},
    "train": {
        "tokens": 4_000_000,
        "batch_tokens": 8192,
        "optimizer": "adamw",
        "lr": 0.003,
        "schedule": "wsd",
        "seed": 0,
    },
    "task": {"kind": "causal_lm", "corpus": "builtin", "tokenizer": "bytes"},
    "scales": {
        "proxy": {"n_blocks": 12, "d_model": 256, "context": 512, "vocab_size": 256, "dtype": "float32"},
        "target": {"n_blocks": 48, "d_model": 2048, "context": 32768, "vocab_size": 128000, "dtype": "bfloat16"},
    },
    "rules": ["count(full) >= 1", "state_bytes(target, context=131072) <= 512 MiB"],
}
ENVIRONMENT: dict[str, Any] = {
    "when": "2026-03-01T08:00:00.000Z",
    "python": "3.11.7",
    "packages": {"archsearch": "0.1.0", "torch": "2.13.0", "optuna": "5.0.0"},
    "platform": "Linux-6.8-x86_64",
    "cpu": {"model": "Example CPU 64-Core", "cores": 16},
    "gpu": "NVIDIA H200, 570.86.15",
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "corpus_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}
MIXERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "attention", "kv_groups": 4},
    "swa": {"kind": "attention", "window": 64},
    "gdn": {"kind": "gated_deltanet", "head_dim": 64, "expand_v": 2},
    "mamba2": {"kind": "mamba2"},
    "mamba": {"kind": "mamba"},
    "conv": {"kind": "short_conv"},
    "moba": {"kind": "moba", "block": 64, "top_k": 3},
    "both": {"kind": "parallel", "of": [{"kind": "mamba2"}, {"kind": "attention", "window": 64}], "fuse": "mean_norm"},
    "hyena": {"kind": "hyena", "order": 2},
    "skip": {"kind": "none"},
}
FFNS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "swiglu"},
    "moe": {"kind": "moe", "n_experts": 16, "top_k": 2},
    "gelu": {"kind": "mlp"},
    "skip": {"kind": "none"},
}
PRICE_AND_WORTH = {
    "full": (1.0, 0.8),
    "swa": (0.2, 0.3),
    "gdn": (0.27, 0.7),
    "mamba2": (0.24, 0.66),
    "mamba": (0.33, 0.6),
    "conv": (0.08, 0.16),
    "moba": (0.75, 0.75),
    "both": (0.4, 0.86),
    "hyena": (0.21, 0.5),
    "skip": (0.0, 0.0),
}


def model(mixers: list[str], ffns: list[str], n_blocks: int, scale: str, share: str = "") -> dict[str, Any]:
    """A ModelSpec as JSON, by hand. share: `kv` (upper half reads block n/2 - 1), `weights` (every sixth)."""
    blocks = []
    for i in range(n_blocks):
        mixer, ffn = mixers[i % len(mixers)], ffns[i % len(ffns)]
        block = {"mixer": MIXERS[mixer], "ffn": FFNS[ffn], "mixer_name": mixer, "ffn_name": ffn}
        if share == "kv" and i >= n_blocks // 2 and mixer == "full":
            block["kv_from"] = n_blocks // 2 - 1
        if share == "weights" and i >= 6 and i % 6 == 0:
            block["mixer_weights_from"] = 0
        blocks.append(block)
    at = SETTINGS["scales"][scale]
    sizes = {name: at[name] for name in ("d_model", "context", "vocab_size", "dtype")}
    return {"task": "causal_lm", **sizes, "trunk": {"norm": "rmsnorm"}, "blocks": blocks}


def architecture(mixers: list[str], ffns: list[str], share: str = "") -> dict[str, Any]:
    """Both scales by hand."""
    return {"proxy": model(mixers, ffns, 12, "proxy", share), "target": model(mixers, ffns, 48, "target", share)}


def real_architecture(kv_groups: int = 1) -> dict[str, Any]:
    """A transformer from the program's own classes."""
    block = Block(
        parse_mixer({"kind": "attention", "kv_groups": kv_groups}), parse_ffn({"kind": "swiglu"}), "full", "dense"
    )
    scales = SETTINGS["scales"]
    return Architecture(
        {
            name: ModelSpec(
                at["d_model"], at["context"], at["vocab_size"], (block,) * at["n_blocks"], dtype=at["dtype"]
            )
            for name, at in scales.items()
        }
    ).to_json()


def quality_and_latency(arch: dict[str, Any]) -> tuple[float, float]:
    """Made up: every mixer has a worth and a price, attention is worth most where there is little of it."""
    blocks = arch["target"]["blocks"]
    mixers = [b["mixer_name"] for b in blocks]
    experts = sum(b["ffn"]["kind"] == "moe" for b in blocks) / len(blocks)
    read = sum("kv_from" in b for b in blocks)
    recall = min(1.0, 6 * sum(m in ("full", "moba") for m in mixers) / len(mixers))
    worth = sum(PRICE_AND_WORTH.get(m, (0.3, 0.5))[1] for m in mixers) / len(mixers) + 0.25 * recall
    ms = 2.2 + 0.9 * (sum(PRICE_AND_WORTH.get(m, (0.3, 0.5))[0] for m in mixers) - 0.55 * read) + 0.9 * experts
    return 2.0 - 0.3 * worth - 0.05 * experts + 0.03 * (read > 0), ms


def record(trial: int, arch: dict[str, Any], *, name: str | None = None, **changes: Any) -> TrialRecord:
    """A complete trial with numbers made up from its layout, the same every time."""
    rng = random.Random(trial)
    mixers = [block["mixer_name"] for block in arch["target"]["blocks"]]
    is_moe = any(block["ffn"]["kind"] == "moe" for block in arch["target"]["blocks"])
    bpb, ms = quality_and_latency(arch)
    bpb, ms = bpb + rng.gauss(0, 0.006), ms * (1 + rng.gauss(0, 0.01))
    params = 1.6e9 + 4e7 * rng.random() + 1.9e9 * is_moe
    cached = sum(m in ("full", "moba") for m in mixers) * 32768 * 2 * 512 * 2 + len(mixers) * 2**20
    curve = [(int(4e6 * i / 120), bpb * 0.69 + 3.4 * math.exp(-i / 9) + rng.gauss(0, 0.03)) for i in range(1, 121)]
    fields: dict[str, Any] = {
        "trial": trial,
        "status": "complete",
        "name": name,
        "arch_id": identity(arch),
        "architecture": arch,
        "holes": {"layout.mixer": "pattern", "mixers.full.kv_groups": 4},
        "train": SETTINGS["train"],
        "objectives": {
            "val_bpb": Measured(value=bpb, spread=0.006),
            "decode_ms": Measured(value=ms, spread=0.012 * ms, n=20),
        },
        "metrics": {
            "val_bpb": bpb,
            "val_loss": bpb * 0.693,
            "tokens_per_s": 91_000.0,
            "params_proxy": params / 90,
            "params_target": params,
            "active_params_target": params - 1.6e9 * is_moe,
            "state_bytes_target": float(cached),
            "flops_per_token_target": 2.4 * (params - 1.6e9 * is_moe),
        },
        "curve": curve,
        "tokens": 4_000_000,
        "seconds": {"latency": 4.0, "train": 44.0, "total": 50.5},
        "device": "NVIDIA H200",
        "started": f"2026-03-01T08:{trial:02}:00.000Z",
        "finished": f"2026-03-01T08:{trial:02}:50.500Z",
        "checkpoint": f"checkpoints/{trial}.safetensors",
    }
    return TrialRecord.model_validate({**fields, **changes})


def failed(trial: int, reason: str, message: str, traceback: str | None = None) -> TrialRecord:
    """An infeasible trial; those that failed before training measured nothing."""
    arch = architecture(["gdn", "swa", "full"], ["dense"])
    nothing = {"objectives": {}, "metrics": {}, "curve": [], "tokens": 0, "checkpoint": None}
    return record(
        trial, arch, status="infeasible", reason=reason, message=message, traceback=traceback,
        arch_id=f"{trial:012x}", **nothing,
    )  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    """SETTINGS with other entries."""
    return {**SETTINGS, **changes}


def trial(number: int, bpb: float, ms: float, spread: float | None = None, **changes: Any) -> TrialRecord:
    """A complete trial by its two values alone."""
    objectives = {"val_bpb": Measured(value=bpb, spread=spread), "decode_ms": Measured(value=ms, spread=spread)}
    arch = {"arch_id": f"arch{number}", "objectives": objectives, **changes}
    return record(number, architecture(["gdn"], ["dense"]), **arch)


def records() -> list[TrialRecord]:
    """28 trials: 3 baselines, 13 sampled ones, 2 duplicates, one failure of each reason (and a second crash)."""
    baselines = [
        record(0, real_architecture(), name="transformer"),
        record(1, architecture(["swa", "swa", "swa", "swa", "swa", "full"], ["dense"]), name="gemma3"),
        record(2, architecture(["gdn", "gdn", "gdn", "full"], ["moe"]), name="qwen3-next"),
    ]
    sampled: Iterable[tuple[list[str], list[str], str]] = (
        (["gdn", "gdn", "gdn", "full"], ["dense"], ""),
        (["gdn"] * 7 + ["full"], ["dense"], ""),
        (["mamba2"] * 5 + ["full"], ["dense", "moe"], "weights"),
        (["swa", "gdn"], ["dense"], ""),
        (["both"], ["dense"], ""),
        (["conv", "conv", "full"], ["gelu"], ""),
        (["gdn", "gdn", "gdn", "gdn", "gdn", "full"], ["moe"], "kv"),
        (["moba", "gdn"], ["moe"], ""),
        (["hyena", "hyena", "hyena", "gdn", "hyena", "full"], ["dense"], ""),
        (["gdn", "skip"], ["dense"], ""),
        (["mamba", "mamba", "mamba", "full"], ["skip", "dense"], ""),
        (["conv", "gdn", "swa"], ["dense"], ""),
        (["gdn", "both", "gdn", "conv"], ["dense", "dense", "moe"], ""),
    )
    trials = [record(i, architecture(m, f, share)) for i, (m, f, share) in enumerate(sampled, 3)]
    trace = (
        'Traceback (most recent call last):\n  File "archsearch/trial.py", line 61, in run_trial\n    loss.backward()\n'
    )
    failures = [
        failed(16, "rule", "count(full) >= 1 is false: 0 >= 1"),
        failed(17, "limit", "decode_ms 131 > limit 90"),
        failed(18, "graph", "block 3 (swa): head_dim 64 does not divide the width 200"),
        failed(19, "out_of_memory", "CUDA out of memory while training", trace + "torch.OutOfMemoryError: 2.1 GiB\n"),
        failed(20, "non_finite", "loss became non-finite at step 112"),
        failed(21, "exception", "ZeroDivisionError: division by zero", trace + "ZeroDivisionError: division by zero\n"),
        failed(22, "crash", "worker died of signal 11 (SIGSEGV)"),
        failed(23, "timeout", "still running after 600 s (trial_timeout)"),
        failed(24, "crash", "worker died of signal 9 (SIGKILL)"),
    ]
    copies = [
        record(i, arch, status="duplicate", copy_of=of, curve=[], tokens=0, checkpoint=None)
        for i, arch, of in ((25, trials[0].architecture, 3), (26, baselines[0].architecture, 0))
    ]
    lost = failed(27, "node_lost", "the node of the worker on 10.0.0.7 is gone")
    return [*baselines, *trials, *failures, *copies, lost]


def write(path: Path, trials: list[TrialRecord] | None = None, settings: dict[str, Any] | None = None) -> RunFolder:
    """The folder of the study above, or of the given trials."""
    folder = RunFolder(path)
    with folder.lock():
        folder.create(
            space_yaml="archsearch: 1\nname: linear-sparse-full\n",
            space={"archsearch": 1, "name": "linear-sparse-full"},
            settings=settings or SETTINGS,
            environment=ENVIRONMENT,
        )
        for trial in records() if trials is None else trials:
            folder.append(trial)
    return folder
