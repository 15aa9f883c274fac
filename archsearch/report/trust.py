"""How far to trust a front: what was measured, what was assumed, and what nobody knows yet. Said with every front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from archsearch.notation import COUNTED, plain, quantity, si
from archsearch.report.front import Axis, Front
from archsearch.store import TrialRecord
from archsearch.store.record import NOISY

ENOUGH = 5  # trials for a rank correlation
UP_TO = {2: 32.0, 3: 6.3, 4: 3.7, 5: 2.9}  # by n: what n values' standard deviation may be short by, 95% (chi squared)


def certificate(
    front: Front, settings: Mapping[str, Any], environment: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts, and as `statements` the same in sentences. `environment`: what the run folder notes of it."""
    tokens = [p.record.tokens for p in front.points if p.record.tokens]
    sizes = [n for p in front.points if 0 < (n := p.record.metrics.get("params_proxy", 0)) < np.inf]
    settled = half_to_end(front)
    facts: dict[str, Any] = {
        "noise": {axis.name: front.spreads.get(axis.name) for axis in front.axes},
        "noisy": {axis.name: _noisy(front, axis) for axis in front.axes},
        "seeds": front.n_seeds,
        "training_tokens": int(np.median(tokens)) if tokens else None,
        "tokens_per_parameter": float(np.median(tokens) / np.median(sizes)) if tokens and sizes else None,
        "rank_correlation_half_to_end": settled,
        "rank_correlation_proxy_to_target": None,
    }
    statements = [
        *_about_noise(front),
        *_about_tokens(environment or {}),
        *_about_scales(front, facts),
        *_about_ranking(settled),
        *_about_windows(front),
        *_about_search(front, settings),
    ]
    return {**facts, "statements": statements}


def _about_noise(front: Front) -> list[str]:
    found = []
    seeds = sorted({str(p.record.train.get("seed", 0)) for p in front.points})
    for axis in front.axes:
        spread = front.spreads.get(axis.name)
        is_time = axis.unit in ("ms", "tokens/s")
        if spread is not None and (spread > 0 or is_time or axis.name.startswith("val_")):
            repeats = int(np.median([p.record.objectives[axis.name].n for p in front.points]))
            how = f", the standard deviation of one baseline over {front.n_seeds} seeds" if front.n_seeds > 1 else ""
            if how and front.n_seeds in UP_TO:
                how += f"; from so few the true one may be up to {UP_TO[front.n_seeds]:g} times as large (95%)"
            if is_time:
                how = f", half of p10 to p90 over {repeats} repeats, taken as one standard deviation"
                if share := front.between.get(axis.name):
                    how = (
                        f". One baseline, measured anew with each of its {front.n_seeds} seeds, has a standard "
                        f"deviation of {share:.0%}, more than the {repeats} repeats in a row show; every value is "
                        "taken to be as uncertain as that"
                    )
            found.append(f"{axis.name}: measured noise, typically ± {plain(spread, 2)} {axis.unit}{how}.")
            if noisy := _noisy(front, axis):
                found.append(
                    f"{axis.name}: {len(noisy)} of {len(front.points)} values are noisy, with a spread of more than "
                    f"{NOISY:.0%} of the value although they were measured again. Something else was busy on the "
                    "device; on a quiet one they may be very different."
                )
        elif is_time:
            found.append(f"{axis.name}: no spread was recorded.")
        elif not axis.name.startswith("val_"):
            found.append(f"{axis.name}: exact.")
        if axis.name.startswith("val_") and front.n_seeds == 1:
            found.append(
                f"{axis.name}: one training per architecture (seed {', '.join(seeds)}). How far another seed would "
                "move it was not measured, so small differences may be luck."
            )
    if front.spreads:
        found.append(
            "The chance of being on the front counts draws in which every value moves by its own measured noise, "
            "normal and independent; noise that was not measured counts as none."
        )
        if near := [p for p in front.points if p.is_near]:
            chances = ", ".join(f"{p.label} ({p.probability:.2f})" for p in near[:5])
            more = f" and {len(near) - 5} more" if len(near) > 5 else ""
            found.append(f"Not on the front, but within the noise perhaps so: {chances}{more}; in brackets the chance.")
        n_tied = sum(bool(p.tied_with) for p in front.members)
        if n_tied:
            found.append(f"{n_tied} of the {len(front.members)} front points cannot be told apart from another point.")
    else:
        found.append("No noise was measured on any axis, so no point has a chance of being on the front by its side.")
    return found


def _about_tokens(environment: Mapping[str, Any]) -> list[str]:
    """A tokenizer that loses text makes bits per byte small, whatever the model."""
    loss = (environment.get("tokenizer") or {}).get("loss")
    return [f"{loss}."] if loss else []


def _noisy(front: Front, axis: Axis) -> list[int]:
    """Trials whose value on an axis is marked as noisy."""
    return [p.record.trial for p in front.points if p.record.objectives[axis.name].is_noisy]


def _about_scales(front: Front, facts: Mapping[str, Any]) -> list[str]:
    def size(scale: str) -> str:
        found = {_size(p.record.architecture[scale]) for p in front.points if scale in p.record.architecture}
        return f" ({found.pop()})" if len(found) == 1 else ""

    tokens, ratio = facts["training_tokens"], facts["tokens_per_parameter"]
    budget = f", {si(tokens)} tokens each" if tokens else ""
    per = f", {plain(ratio, 2)} per parameter" if ratio else ""
    return [
        f"Quality was learned at proxy scale{size('proxy')}{budget}{per}; speed and memory were read at target "
        f"scale{size('target')} with random weights. Whether the order by quality is the same at target scale was not "
        "measured."
    ]


def _size(model: Mapping[str, Any]) -> str:
    return f"{len(model.get('blocks', ()))} blocks, d_model {model.get('d_model')}, context {model.get('context')}"


def _about_ranking(correlation: Mapping[str, float] | None) -> list[str]:
    if correlation is None:
        return ["Whether a longer training would keep the order by quality was not measured."]
    return [
        f"Ranked by training loss at half of the tokens and by quality at the end, {correlation['n']:.0f} "
        f"architectures agree at Spearman {correlation['spearman']:.2f}; that says how settled the order is at this "
        "budget, not what a longer training or a larger model would do."
    ]


def _about_windows(front: Front) -> list[str]:
    reaching = sum(_window_reaches_context(p.record.architecture.get("proxy", {})) for p in front.members)
    if not reaching:
        return []
    return [
        f"In {reaching} of the {len(front.members)} layouts on the front a window reaches the proxy's whole context: "
        "what was trained there is full attention."
    ]


def _window_reaches_context(model: Mapping[str, Any]) -> bool:
    context = model.get("context", 0)
    windows = [block.get("mixer", {}).get("window") for block in model.get("blocks", ())]
    return any(isinstance(w, int) and 0 < context <= w for w in windows)


def _about_search(front: Front, settings: Mapping[str, Any]) -> list[str]:
    search = settings.get("search", {})
    devices = sorted({p.record.device for p in front.points if p.record.device})
    n = sum(front.n_trials.values()) - front.n_trials.get("duplicate", 0)  # nothing was run for these
    found = [
        f"{len(front.points)} of {n} trials were compared (sampler {search.get('sampler', 'unknown')}, seed "
        f"{search.get('seed', 0)}). A front is the best of what was tried, not the best there is; whether the sampler "
        "beats random search here was not measured."
    ]
    if devices:
        found.append(f"Times hold for {', '.join(devices)} with the software listed under Environment.")
    if len(devices) > 1:
        found.append("More than one device took part: times of different devices do not compare.")
    if stopped := front.n_trials.get("stopped"):
        found.append(
            f"{stopped} trials were stopped at an earlier rung and are not shown: less training does not compare."
        )
    if front.refused_noisily:
        found.append(
            f"{front.refused_noisily} trials were refused by a limit on a noisy value: on a quiet device they might "
            "have been within it."
        )
    if front.left_out:
        found.append(f"{front.left_out} complete trials are not shown, because an objective is missing.")
    return found


def half_to_end(front: Front) -> dict[str, float] | None:
    """Spearman correlation between training loss around half of the tokens and the final validation loss.

    None with fewer than five trials that have both, or if either is the same for all.
    """
    pairs = []
    for point in front.points:
        final = point.record.metrics.get("val_bpb", point.record.metrics.get("val_loss"))
        half = _loss_around_half(point.record)
        if final is not None and half is not None and np.isfinite(final):
            pairs.append((half, final))
    if len(pairs) < ENOUGH:
        return None
    ranked = np.array([_average_ranks(np.array(column)) for column in zip(*pairs, strict=True)])
    if (ranked.std(axis=1) == 0).any():
        return None
    return {"spearman": float(np.corrcoef(ranked)[0, 1]), "n": len(pairs)}


def _loss_around_half(record: TrialRecord) -> float | None:
    losses = [loss for tokens, loss in record.curve if 0.4 <= tokens / max(1, record.tokens) <= 0.5]
    return float(np.mean(losses)) if losses and np.isfinite(losses).all() else None


def _average_ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Ranks with ties sharing their mean."""
    return [float((values < v).sum() + ((values == v).sum() - 1) / 2) for v in values]


def against(front: Front) -> list[str]:
    """One sentence per baseline: the front point that beats it by most, and by how much; noise is named."""
    found = []
    for baseline in front.baselines:
        if baseline.on_front:
            found.append(f"{baseline.label} is on the front.")
            continue
        both = front.costs([*front.members, baseline])
        reach = np.ptp(front.costs(front.points), axis=0)
        gains = (both[-1] - both[:-1]) / np.where(reach > 0, reach, 1.0)
        beats = [k for k in range(len(front.members)) if (gains[k] >= 0).all()]
        best = front.members[max(beats, key=lambda k: gains[k].sum())]
        parts = []
        for axis in front.axes:
            mine, theirs = best.record.objectives[axis.name], baseline.record.objectives[axis.name]
            gap = abs(mine.value - theirs.value)
            ratio = max(mine.value, theirs.value) / low if (low := min(mine.value, theirs.value)) > 0 else 0.0
            text = f"{axis.name} {quantity(mine.value, axis.unit)} against {quantity(theirs.value, axis.unit)}"
            text += f" ({plain(ratio, 2)}x)" if ratio >= 1.2 and axis.unit in (*COUNTED, "ms", "bytes") else ""
            sigma = np.hypot(best.sigma[axis.name], baseline.sigma[axis.name])
            parts.append(text + (", within the noise" if gap and gap <= 2 * sigma else ""))
        name = f"front point {best.number}" + (f" ({best.record.name})" if best.record.name else "")
        found.append(f"{baseline.label} is beaten by {name}: {'; '.join(parts)}.")
    return found
