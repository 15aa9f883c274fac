"""The last brush: imports that are still needed, blank lines, and statements laid out for their new length.

Statements that folding left alone keep their author's layout; the others get the one that the ruff formatter would
give them: one line if it fits, else the content of the last bracket on a line of its own, else one item a line.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize

from archsearch.export.imports import Imported, import_lines
from archsearch.export.source import Edit, Source

WIDTH = 120
FOR_TOOLS = re.compile(r"(?m)  # (?:type: ignore|noqa).*$")  # comments for our own type checker and linter
OPEN, CLOSE = "([{", ")]}"


def tidy(text: str, before: str) -> str:
    """`text`, formatted where it differs from `before`."""
    text = FOR_TOOLS.sub("", text)
    source = _laid_out(Source(text), _statements(Source(FOR_TOOLS.sub("", before))))
    return _blank_lines(_with_needed_imports(source))


def _header(node: ast.stmt, source: Source) -> tuple[int, int]:
    """First and last line of a statement, its block left out; decorators are not part of it."""
    body = getattr(node, "body", None)
    assert node.end_lineno is not None
    if not isinstance(body, list) or not body:
        return node.lineno, node.end_lineno
    last = source.statement_lines(body[0])[0] - 1
    while not source.lines[last - 1].strip():
        last -= 1
    return node.lineno, max(last, node.lineno)


def _statements(source: Source) -> set[str]:
    return {source.line_text(*_header(node, source)) for _, block in source.blocks for node in block}


def _laid_out(source: Source, known: set[str]) -> Source:
    edits = []
    for node in (node for _, block in source.blocks for node in block):
        lines = _header(node, source)
        old = source.line_text(*lines)
        is_long = any(len(line.rstrip("\n")) > WIDTH for line in old.split("\n"))
        if is_long or (old not in known and old.count("\n") > 1):
            new = layout(old)
            if new != old:
                edits.append(Edit(*source.line_span(*lines), new))
    return source.edited(edits)


def layout(statement: str) -> str:
    """One statement (or the header of a compound one), laid out; with a comment or a long string inside it stays."""
    indent = len(statement) - len(statement.lstrip())
    body = statement.strip()
    comment = ""
    tokens = _tokens(body)
    if tokens and tokens[-1].type == tokenize.COMMENT:
        comment = "  " + tokens[-1].string
        body = body[: -len(tokens[-1].string)].rstrip()
        tokens = tokens[:-1]
    if any(t.type == tokenize.COMMENT or "\n" in t.string for t in tokens):
        return statement
    return "\n".join(_split(_one_line(body), indent, comment)) + "\n"


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT)
    padded = text + " pass\n" if text.endswith(":") else text + "\n"
    found = [t for t in tokenize.generate_tokens(io.StringIO(padded).readline) if t.type not in skipped]
    return found[:-1] if text.endswith(":") else found


def _one_line(text: str) -> str:
    """Line breaks taken out, and the commas before closing brackets that only they asked for."""
    joined = ""
    for line in (part.strip() for part in text.split("\n")):
        tight = not joined or joined[-1] in OPEN or line[:1] in CLOSE
        joined += line if tight else " " + line
    commas: list[list[int]] = []
    openers: list[int] = []
    spare: set[int] = set()
    for at, char in _code(joined):
        if char in OPEN:
            commas.append([])
            openers.append(at)
        elif char == "," and commas:
            commas[-1].append(at)
        elif char in CLOSE:
            mine, opener = commas.pop(), openers.pop()
            is_tuple = char == ")" and not re.search(r"[\w)\]]$", joined[:opener])
            if mine and mine[-1] == at - 1 and (len(mine) > 1 or not is_tuple):
                spare.add(mine[-1])
    return "".join(char for at, char in enumerate(joined) if at not in spare)


def _split(line: str, indent: int, comment: str = "") -> list[str]:
    margin = " " * indent
    if indent + len(line) <= WIDTH:
        return [margin + line + comment]
    brackets = _bracket_to_open(line)
    if brackets is None:
        return [margin + line + comment]
    start, end = brackets
    head, content, tail = line[: start + 1], line[start + 1 : end], line[end:]
    if indent + 4 + len(content) <= WIDTH:
        inside = [" " * (indent + 4) + content]
    else:
        items = _items(content)
        if len(items) == 1:
            inside = _split(content, indent + 4)
        else:
            inside = [part for item in items for part in _with_comma(_split(item, indent + 4))]
    return [margin + head + comment, *inside, margin + tail]


def _with_comma(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1] + ","]


def _bracket_to_open(line: str) -> tuple[int, int] | None:
    """The outermost bracket pair that closes last and holds something; of a function, its parameters."""
    is_definition = line.startswith(("def ", "async def "))
    depth, opened = 0, 0
    found = None
    for at, char in _code(line):
        if char in OPEN:
            if depth == 0:
                opened = at
            depth += 1
        elif char in CLOSE:
            depth -= 1
            if depth == 0 and at > opened + 1 and not (is_definition and found):
                found = (opened, at)
    return found


def _items(content: str) -> list[str]:
    """Split at the commas outside of brackets."""
    depth, start, out = 0, 0, []
    for at, char in _code(content):
        depth += (char in OPEN) - (char in CLOSE)
        if char == "," and depth == 0:
            out.append(content[start:at].strip())
            start = at + 1
    return [*out, content[start:].strip()] if content[start:].strip() else out


def _code(line: str) -> list[tuple[int, str]]:
    """Characters outside of string literals."""
    out, quote = [], ""
    for at, char in enumerate(line):
        if quote:
            quote = "" if char == quote and line[at - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        else:
            out.append((at, char))
    return out


def _with_needed_imports(source: Source) -> Source:
    """The imports at the top, without the names that nobody uses."""
    statements = [n for n in source.tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    used = {n.id for n in source.of_kind(ast.Name)}
    needed: dict[str, Imported] = {}
    for node in statements:
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            if bound in used and isinstance(node, ast.Import):
                needed[bound] = Imported(alias.name, None)
            elif bound in used and isinstance(node, ast.ImportFrom):
                needed[bound] = Imported(node.module or "", alias.name)
    start = source.line_span(statements[0].lineno, statements[0].lineno)[0]
    last = statements[-1].end_lineno
    assert last is not None
    rest = source.text[source.line_span(last, last)[1] :].lstrip("\n")
    is_code = rest.startswith(("class ", "def ", "@"))
    top = "from __future__ import annotations\n\n" + import_lines(needed) + ("\n\n" if is_code else "\n")
    return source.edited([Edit(start, len(source.text) - len(rest), top)])


def _blank_lines(source: Source) -> str:
    """Two between definitions, one at most inside of them, none after a header."""
    inside = set(source.lines_in_strings)
    for node in source.of_kind(ast.Expr):
        if isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            inside.update(range(node.lineno, node.end_lineno + 1))
    out: list[str] = []
    for number, line in enumerate(source.lines, 1):
        if number not in inside and not line.strip():
            following = next((n for n in source.lines[number:] if n.strip()), "")
            most = 2 if following[:1].strip() else 1
            blank = len(out) - len(_without_blank_end(out))
            header = bool(out) and out[-1].rstrip().endswith(":") and number - 1 not in inside
            if blank >= most or header:
                continue
        out.append(line)
    return "".join(out).rstrip("\n") + "\n"


def _without_blank_end(lines: list[str]) -> list[str]:
    n = len(lines)
    while n and not lines[n - 1].strip():
        n -= 1
    return lines[:n]
