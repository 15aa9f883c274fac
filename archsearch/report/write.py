"""Writes a run's report files. Needs its folder and nothing else: no GPU, no torch, no network."""

from __future__ import annotations

from archsearch.report.front import Front, build_front, front_csv, front_json
from archsearch.report.html import page
from archsearch.report.trust import certificate
from archsearch.store import RunFolder


def write_report(folder: RunFolder, *, with_picture: bool = True) -> Front:
    """Write front.json, front.csv, report.html and (with matplotlib, about a second) front.png; returns the front.

    Each file is replaced as a whole, so that a reader or a kill never meets half of one. Raises RunError if the folder
    cannot be read or written.
    """
    records, settings = folder.records(), folder.read_json("settings.json")
    environment = folder.read_json("environment.json")
    front = build_front(records, settings)
    trust = certificate(front, settings, environment)
    folder.write_json("front.json", front_json(front, trust))
    folder.write_text("front.csv", front_csv(front))
    run = f"{folder.path.parent.name}/{folder.path.name}".lstrip("/")
    folder.write_text("report.html", page(front, records, settings, environment, trust, run))
    if with_picture and front.points and len(front.axes) > 1:  # one objective has no front to draw
        from archsearch.report.picture import picture

        folder.write_bytes("front.png", picture(front))
    return front
