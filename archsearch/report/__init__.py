"""Everything a person reads of a run, made from its folder alone: front.json, front.csv, report.html, front.png."""

from __future__ import annotations

from archsearch.report.front import Front as Front
from archsearch.report.front import Point as Point
from archsearch.report.front import build_front as build_front
from archsearch.report.summary import summary as summary
from archsearch.report.write import write_report as write_report
