"""report.html: one file, no request to anywhere, readable without JavaScript, light or dark, on paper and on phones."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from archsearch.notation import si
from archsearch.report.curves import learning_curves, search_progress
from archsearch.report.front import Front
from archsearch.report.layouts import export_command, layouts
from archsearch.report.markup import Markup, join, tag
from archsearch.report.plot import make_plot
from archsearch.report.scatter import scatter
from archsearch.report.tables import failure_table, front_table
from archsearch.report.trust import against
from archsearch.store import TrialRecord

PAIRS = 3  # scatters drawn when there are more than two objectives


def page(
    front: Front,
    records: Sequence[TrialRecord],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    trust: Mapping[str, Any],
    run: str,
) -> str:
    """The whole page. `run`: the folder as a person would type it."""
    style, script = (Markup(Path(__file__).with_name(name).read_text("utf-8")) for name in ("style.css", "hover.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("title", f"{front.study} · archsearch"),
        tag("style", style),
    )
    body = tag(
        "main",
        _headline(front, records, settings, environment),
        *(
            _results(front, trust, run)
            if front.points
            else [_section("The front", tag("p", "No trial is complete yet."))]
        ),
        _section("What failed", failure_table(records), id_="failures"),
        _section("Environment", _environment(settings, environment), id_="environment"),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body, tag('script', script)), lang='en')}\n"


def _section(title: str, *content: object, id_: str | None = None, class_: str | None = None) -> Markup:
    return tag("section", tag("h2", title), *content, id=id_, class_=class_)


def _headline(
    front: Front, records: Sequence[TrialRecord], settings: Mapping[str, Any], environment: Mapping[str, Any]
) -> Markup:
    words = {"failed": "failed", "refused": "refused", "duplicate": "repeated", "stopped": "stopped early"}
    counts = Counter(record.ended for record in records)
    others = [f"{counts[how]} {word}" for how, word in words.items() if how in counts]
    tokens = max((p.record.tokens for p in front.points), default=0)
    devices = sorted({r.device for r in records if r.device})
    facts = [
        ("on the front", len(front.members), f"of {len(front.points)} compared"),
        ("trials", len(records), ", ".join(others) or "all complete"),
        ("training of each", f"{si(tokens)} tokens" if tokens else "", "at proxy scale"),
        ("device", _machine(devices, environment), _period(records)),
        ("time", _spent(records), "in trials, workers added up"),
    ]
    return join(
        [
            tag("h1", front.study),
            tag("p", settings.get("description") or "Hybrid layouts searched by archsearch", class_="lead"),
            tag(
                "dl",
                *(tag("div", tag("dt", k), tag("dd", v, tag("small", more))) for k, v, more in facts if v != ""),
                class_="facts",
            ),
        ]
    )


def _machine(devices: Sequence[str], environment: Mapping[str, Any]) -> str:
    cpu = (environment.get("cpu") or {}).get("model")
    return ", ".join(f"CPU, {cpu}" if device == "cpu" and cpu else device for device in devices)


def _period(records: Sequence[TrialRecord]) -> str:
    if not records:
        return ""
    first, last = min(r.started for r in records)[:16], max(r.finished for r in records)[:16]
    until = last[11:] if first[:10] == last[:10] else last
    return f"{first.replace('T', ' ')} to {until.replace('T', ' ')} UTC"


def _spent(records: Sequence[TrialRecord]) -> str:
    seconds = sum(r.seconds.get("total", 0.0) for r in records)
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def _results(front: Front, trust: Mapping[str, Any], run: str) -> list[Markup]:
    pick = export_command(run, "ARCH_ID")
    return [
        _section("The front", *_scatters(front), id_="front"),
        _section(
            "Layouts",
            tag("p", "One cell per block, from the first on the left to the last on the right.", class_="quiet"),
            layouts(front, run),
            id_="layouts",
        ),
        _section(
            "Numbers",
            front_table(front),
            tag("p", "Any of them as model code: ", tag("code", pick), " (or ", tag("code", "--pick knee"), ")."),
            id_="numbers",
        ),
        _section(
            "How far to trust this",
            tag("ul", *(tag("li", statement) for statement in trust["statements"])),
            id_="trust",
            class_="trust",
        ),
        _section(
            "How it was learnt",
            tag(
                "p",
                "Training loss (nats per token) over tokens, both logarithmic; all other trials in grey.",
                class_="quiet",
            ),
            learning_curves(front),
            tag("h3", "How the search went"),
            search_progress(front),
            id_="learning",
        ),
    ]


def _scatters(front: Front) -> list[Markup]:
    pairs = [(x, y) for y, x in combinations(front.axes, 2)][:PAIRS]
    found = []
    for x, y in pairs:
        reads = " against ".join(f"{axis.name} ({axis.where})" if axis.where else axis.name for axis in (y, x))
        found.append(tag("p", reads, ".", class_="quiet"))
        found.append(scatter(make_plot(front, x, y, 980, 520), "wide"))
        found.append(scatter(make_plot(front, x, y, 360, 380), "narrow"))
    if len(pairs) > 1:
        found.append(tag("p", "The front is that of all objectives together, so each picture shows a part of it."))
    if not pairs:
        found.append(tag("p", "A single objective has no front to draw; its best is the first layout below."))
    findings = [tag("li", sentence) for sentence in against(front)]
    return [*found, _key(front), tag("ul", *findings, class_="findings") if findings else join([])]


def _key(front: Front) -> Markup:
    def item(shape: Markup, text: str) -> Markup:
        return tag("li", tag("svg", shape, width=18, height=16, aria_hidden="true"), tag("span", text))

    diamond = "9,1.5 15.5,8 9,14.5 2.5,8"
    items = [
        item(tag("circle", cx=9, cy=8, r=6, class_="point front"), "on the front"),
        item(tag("polygon", points=diamond, class_="point baseline"), "baseline (ringed: on the front)"),
        item(tag("circle", cx=9, cy=8, r=3.5, class_="point dominated"), "dominated"),
    ]
    if any(p.is_near for p in front.points):
        items.append(item(tag("circle", cx=9, cy=8, r=4.5, class_="point near"), "dominated by less than the noise"))
    if any(p.tied_with for p in front.points):
        items.append(item(tag("line", x1=5, x2=13, y1=8, y2=8, class_="tie"), "cannot be told apart (2 σ)"))
    if front.spreads:
        items.append(item(tag("g", tag("line", x1=2, x2=16, y1=8, y2=8), class_="bars front"), "± 1 σ"))
    return tag("ul", *items, class_="key")


def _environment(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> Markup:
    git, cpu = environment.get("git") or {}, environment.get("cpu") or {}
    pairs = {
        "GPU": environment.get("gpu"),
        "CPU": f"{cpu.get('model')}, {cpu.get('cores')} cores" if cpu else None,
        "platform": environment.get("platform"),
        "Python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
        "git": f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else None,
        "corpus sha256": environment.get("corpus_sha256"),
        **{name: _settings_line(settings.get(name)) for name in ("task", "train", "search")},
        **{f"{name} scale": _settings_line(at) for name, at in settings.get("scales", {}).items()},
        "rules": "; ".join(map(str, settings.get("rules", []))),
    }
    return tag("dl", *(tag(*pair) for k, v in pairs.items() if v for pair in (("dt", k), ("dd", v))), class_="pairs")


def _settings_line(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""

    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {show(item)}" for key, item in value.items())
        if isinstance(value, list):
            return ", ".join(map(show, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    shown = {key: show(value) for key, value in values.items() if value is not None}
    return " · ".join(f"{key} {value}" for key, value in shown.items() if value)
