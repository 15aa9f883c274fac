"""report.html as a browser meets it: well-formed, self-contained, harmless, and with everything on it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import example_run
import pytest

from archsearch.report import write_report
from archsearch.report.blocks import read_blocks
from archsearch.report.strips import diagonal_split, make_strip, strip_svg
from archsearch.store.record import Reason

VOID = {"meta", "br"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&`${x}`\x00\u202e]]>"


class Page(HTMLParser):
    """Every start tag in order; asserts that tags nest, that ids are unique and that nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [a["id"] for _, a in self.tags if "id" in a]
        assert len(ids) == len(set(ids))
        links = [a["href"] or "" for _, a in self.tags if "href" in a]
        assert {link for link in links if link.startswith("#")} == set(links)
        assert {link[1:] for link in links} <= set(ids)
        assert not any("src" in a or any(key.startswith("on") for key in a) for _, a in self.tags)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def words(self) -> str:
        return " ".join(text for tag, text in self.text if tag not in ("style", "script"))

    def count(self, name: str, **attributes: str) -> int:
        return sum(
            tag == name and all(a.get(k.rstrip("_")) == v for k, v in attributes.items()) for tag, a in self.tags
        )


def render(path: Path, trials: list[Any] | None = None, settings: dict[str, Any] | None = None) -> str:
    folder = example_run.write(path / "runs" / "toy", trials, settings)
    write_report(folder, with_picture=False)
    return (folder.path / "report.html").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_holds_everything(page: Page) -> None:
    words = page.words()
    for phrase in (
        "Where does a 48-block model need full attention",
        "NVIDIA H200",
        "8 of 16 compared",
        "transformer is beaten by front point",
        "qwen3-next is on the front",
        "12x(gdn gdn gdn full)",
        "archsearch export runs/toy --pick ",
        "worker died of signal 11",
        "ZeroDivisionError: division by zero",
        "Whether the order by quality is the same at target scale was not measured",
        "torch 2.13.0",
        "0123456789ab",
        "mamba2 + attention, windowed",
        "keys and values reused",
    ):
        assert phrase in " ".join(words.split()), phrase
    assert page.count("script") == 1
    assert page.count("svg", class_="scatter wide") == page.count("svg", class_="scatter narrow") == 1
    assert page.count("article") == 8 + 2  # the front, and two baselines off it
    for reason in get_args(Reason):
        assert ("td", reason) in page.text


def test_nothing_is_fetched(text: str) -> None:
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttp", "import("):
        assert word not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_it_reads_without_scripts_in_both_schemes_and_on_paper(text: str) -> None:
    body = text.partition("<body>")[2].partition("<script>")[0]
    assert "hidden" not in body.replace('aria-hidden="true"', "")
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 640px"):
        assert query in text
    assert '<meta name="viewport"' in text
    assert body.count("<title>") >= 16  # every point says its numbers without scripts


def test_every_block_is_drawn_at_both_scales(page: Page) -> None:
    labels = [a["aria-label"] or "" for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert "target: 12x(gdn gdn gdn full) | 48xmoe" in labels
    assert "proxy: 3x(gdn gdn gdn full) | 12xmoe" in labels
    assert sum(label.startswith("proxy: ") for label in labels) == sum(label.startswith("target: ") for label in labels)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    arch = example_run.architecture(["gdn", "full"], ["moe"])
    for model in arch.values():
        model["d_model"] = HOSTILE
        for block in model["blocks"]:
            block.update(mixer_name=HOSTILE + block["mixer_name"], ffn_name=HOSTILE)
            block["mixer"] = {"kind": HOSTILE}
            block["ffn"] = {"kind": HOSTILE}
    trials = [
        example_run.record(0, arch, name=HOSTILE, arch_id=HOSTILE, device=HOSTILE, holes={HOSTILE: HOSTILE}),
        example_run.record(1, arch, arch_id="other", metrics={HOSTILE: 1.0}),
        example_run.failed(2, "exception", HOSTILE, HOSTILE),
    ]
    settings = {**example_run.SETTINGS, "name": HOSTILE, "description": HOSTILE, "rules": [HOSTILE]}
    settings["task"] = {HOSTILE: HOSTILE}
    settings["objectives"] = [{**goal, "unit": HOSTILE, "scale": HOSTILE} for goal in settings["objectives"]]
    text = render(tmp_path, trials, settings)
    page = Page(text)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert "alert(1)" in page.words()
    assert "\x00" not in text
    assert "\u202e" not in text  # would turn the rest of a line round


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    render(tmp_path, [], {**example_run.SETTINGS, "description": "\ud800"})


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_a_parallel_cell_is_split_evenly(n: int) -> None:
    def area(corners: tuple[tuple[float, float], ...]) -> float:
        turned = zip(corners, corners[1:] + corners[:1], strict=True)
        return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in turned)) / 2

    parts = diagonal_split(n)
    assert len(parts) == n
    assert [area(part) for part in parts] == pytest.approx([1 / n] * n)
    assert all(0 <= c <= 1 for part in parts for corner in part for c in corner)


def test_strips_show_sharing_and_experts() -> None:
    arch = example_run.architecture(["full"], ["moe", "dense"], "weights")
    strip = make_strip(read_blocks(arch["proxy"]), {"full": "F"})
    (weights,) = strip.brackets
    assert (weights.what, weights.source, weights.readers) == ("weights", 0, (6,))
    assert len(strip.dots) == 3 * 6
    assert [letter for _, letter, _ in strip.letters] == ["F"] * 12
    shared = make_strip(read_blocks(example_run.architecture(["full"], ["dense"], "kv")["proxy"]), {})
    (kv,) = shared.brackets
    assert (kv.what, kv.source, kv.readers) == ("kv", 5, tuple(range(6, 12)))
    assert shared.height > strip_height_without_sharing()
    assert 'class="bracket kv"' in strip_svg(shared, "x")


def strip_height_without_sharing() -> float:
    return make_strip(read_blocks(example_run.architecture(["full"], ["dense"])["proxy"]), {}).height


def test_brackets_that_cross_get_lanes_of_their_own() -> None:
    arch = example_run.architecture(["full"], ["dense"])["proxy"]
    for block, source in ((2, 0), (3, 1), (5, 4)):
        arch["blocks"][block]["kv_from"] = source
    strip = make_strip(read_blocks(arch), {})
    assert [(b.source, b.lane) for b in strip.brackets] == [(0, 0), (1, 1), (4, 0)]


def test_kinds_nobody_knows_are_hatched() -> None:
    blocks = read_blocks({"blocks": [{"mixer": {"kind": "hyena"}, "ffn": {"kind": "kan", "n_experts": 4}}, {}]})
    strip = make_strip(blocks, {})
    assert [cell.hatched for cell in strip.cells] == [True, True, True, True]
    assert len(strip.dots) == 3
    assert strip_svg(strip, "x").count('class="hatch"') == 4
