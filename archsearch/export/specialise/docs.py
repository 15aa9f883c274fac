"""Docstrings of folded code: what they say of options that are gone goes too."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping

from archsearch.export.source import Edit, Source, all_names, walk
from archsearch.export.specialise.values import Value

WIDTH = 120
COMMAS = re.compile(r"(?<=,)\s+(?![^\[(]*[\])])")  # outside of brackets
Gone = Mapping[str, Value]  # option -> what it always was


def trim_docstrings(source: Source, dropped: Mapping[str, Gone], required: Mapping[str, set[str]]) -> Source:
    """Every docstring without the clauses about what its function or class no longer has.

    `dropped` and `required` are what the `Specialiser` took away, by function or class.
    """
    edits = []
    raised = _Raised(source)
    for owner, node in _documented(source.tree):
        gone = {**dropped.get(owner.rpartition(".")[0], {}), **dropped.get(owner, {})}
        first = node.body[0]
        if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
            continue
        start, end = source.span(first)
        old = source.text[start:end]
        if isinstance(first.value.value, str) and old.startswith('"""') and old.endswith('"""'):
            raises = {n for n in ("ValueError", "AssertionError") if not raised(n, node)}
            trimmer = Trimmer(gone, required.get(owner, set()), raises, first.col_offset)
            edits.append(Edit(start, end, f'"""{trimmer.trim(old[3:-3])}"""'))
    return source.edited(edits)


class _Raised:
    """Whether a function or class raises an error, itself or by a function of this file that it names."""

    def __init__(self, source: Source) -> None:
        self._errors: dict[ast.AST, list[str]] = {}
        self._functions = {node.name: node for node in source.tree.body if isinstance(node, ast.FunctionDef)}

    def __call__(self, error: str, node: ast.FunctionDef | ast.ClassDef) -> bool:
        seen: set[str] = set()
        todo: list[ast.AST] = [node]
        while todo:
            at = todo.pop()
            if any(raised.startswith(error) for raised in self._raised_in(at)):
                return True
            new = all_names(at) & self._functions.keys() - seen
            seen |= new
            todo += [self._functions[name] for name in new]
        return False

    def _raised_in(self, node: ast.AST) -> list[str]:
        if node not in self._errors:
            raises = [n.exc for n in walk(node) if isinstance(n, ast.Raise) and n.exc is not None]
            self._errors[node] = [ast.unparse(error) for error in raises]
        return self._errors[node]


def _documented(tree: ast.Module) -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    found: list[tuple[str, ast.FunctionDef | ast.ClassDef]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            found += [(f"{node.name}.{c.name}", c) for c in node.body if isinstance(c, ast.FunctionDef)]
    return found


class Trimmer:
    """Takes clauses out of one docstring: whatever speaks of an option that is gone."""

    def __init__(self, gone: Gone, required: set[str], never_raised: set[str], indent: int) -> None:
        self.gone = gone
        self.required = required
        self.margin = " " * indent
        self._patterns = [rf"\b{re.escape(name)} None\b" for name in required]
        self._patterns += [rf"^Raises {name}\b" for name in never_raised]
        for name in map(re.escape, gone):
            self._patterns += [rf"`{name}`", rf"^{name}:", rf"^{name} (\[|an? |None\b)", rf"^Raises .*\b{name}\b"]
            if "_" in name:  # no English word
                self._patterns.append(rf"\b{name}\b")

    def trim(self, text: str) -> str:
        """The text between the quotes, filled anew where something went."""
        paragraphs = re.split(r"\n\s*\n", text.rstrip())
        kept = [new for i, old in enumerate(paragraphs) if (new := self._paragraph(old, is_first=i == 0))]
        one_line = len(kept) == 1 and "\n" not in kept[0].strip()
        return "\n\n".join([kept[0].strip(), *kept[1:]]) + ("" if one_line else "\n" + self.margin)

    def _speaks_of_gone(self, text: str) -> bool:
        return any(re.search(pattern, text) for pattern in self._patterns)

    def _paragraph(self, text: str, is_first: bool) -> str:
        if text.lstrip().startswith("|"):
            return self._table(text)
        written = re.split(r"(?<=\.)\s+(?![a-z])", " ".join(text.split()))
        sentences = self._of_this_case(written)
        clauses = [clause for sentence in sentences for clause in re.split(r"(?<=;)\s+", sentence)]
        is_whole = not any(self._speaks_of_gone(part) or self._listed(part) != part for part in (text, *clauses))
        if is_whole and sentences == written:
            return text
        kept = [new for i, old in enumerate(sentences) if (new := self._sentence(old, is_first and i == 0))]
        return textwrap.fill(" ".join(kept), WIDTH - 3, initial_indent=self.margin, subsequent_indent=self.margin)

    def _of_this_case(self, sentences: list[str]) -> list[str]:
        """Of sentences for the values of an option, `"softmax": the largest`, the one for the value that it has."""
        cases = {sentence: case[1] for sentence in sentences if (case := re.match(r'"(\w+)": ', sentence))}
        values = {value.constant.value for value in self.gone.values() if value.constant is not None}
        if values.isdisjoint(cases.values()):
            return sentences
        kept = (sentence for sentence in sentences if cases.get(sentence) in {None, *values})
        told = {s: s.partition(": ")[2] for s in cases}
        return [told[s][0].upper() + told[s][1:] if s in told else s for s in kept]

    def _sentence(self, text: str, is_summary: bool) -> str:
        clauses = re.split(r"(?<=;)\s+", text)
        kept: list[str] = []
        dropping = False
        for clause in [self._listed(clause) for clause in clauses]:
            refers_back = dropping and re.match(r"(it|its|they|their|this)\b", clause)
            dropping = bool(refers_back) or self._speaks_of_gone(clause)
            if not dropping:
                kept.append(clause)
        if kept == clauses:
            return text
        if not kept and is_summary:
            parts = COMMAS.split(text)
            kept = [part for part in parts if not self._speaks_of_gone(part)] or [text]
        if not kept:
            return ""
        out = re.sub(r"[;,]$", ".", " ".join(kept))
        started_lower = clauses[0][0].islower()
        is_word = re.match(r"[a-z]+(?= )", out)
        return out if started_lower or not is_word else out[0].upper() + out[1:]

    def _listed(self, clause: str) -> str:
        """`x [B, T], bias [D], state [B, D]` without the bias that is gone; of what is always passed no `None: ...`."""
        parts = COMMAS.split(clause)
        names = "|".join(map(re.escape, self.gone)) or "$^"
        is_passed = parts[0].partition(" ")[0] in self.required
        kept = [p for p in parts if not (re.match(rf"({names}) \[", p) or (is_passed and p.startswith("None: ")))]
        if not 0 < len(kept) < len(parts):
            return clause
        end = clause[-1] if clause[-1] in ".;" and kept[-1][-1] == "," else kept[-1][-1]
        return " ".join(kept)[:-1] + end

    def _table(self, text: str) -> str:
        """A table over the values of an option keeps the row of the value it has."""
        lines = text.split("\n")
        key = _first_cell(lines[0])
        constant = self.gone[key].constant if key in self.gone else None
        if constant is None:
            return text
        kept = [line for line in lines[2:] if _first_cell(line) == str(constant.value)]
        return "\n".join([*lines[:2], *kept])


def _first_cell(row: str) -> str:
    return row.strip().strip("|").partition("|")[0].strip().strip("`")
