"""Published hybrids as YAML files without holes (`search_spaces/recipes/`), which studies borrow as baselines."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from archsearch.describe import kind_names, nearest_kind
from archsearch.errors import SpaceError, did_you_mean, one_of
from archsearch.space import Candidate, SearchSpace
from archsearch.space.yaml_source import Source, read_yaml

BORROWED = ("scales", "task", "train")  # a baseline is trained and timed as the study's own candidates are


@cache
def recipes_dir() -> Path:
    """Where the recipes lie: in the wheel, or beside the package in a checkout."""
    packaged = Path(str(files("archsearch"))) / "search_spaces" / "recipes"
    return packaged if packaged.is_dir() else Path(str(files("archsearch"))).parent / "search_spaces" / "recipes"


def recipe_names() -> list[str]:
    """All recipes, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe; raises SpaceError with the nearest name."""
    if name not in recipe_names():
        known = recipe_names()
        raise SpaceError(f"unknown recipe '{name}'; expected {one_of(known)}.{did_you_mean(name, known)}")
    return recipes_dir() / f"{name}.yaml"


def load_space(path: Path, vocab_size: int | None = None) -> SearchSpace:
    """The space in a file, as `SearchSpace.load` reads it.

    Raises SpaceError; where there is no such file, with the recipe or kind that is meant.
    """
    if path.exists() or path.suffix or len(path.parts) > 1:
        return SearchSpace.load(path, vocab_size)
    name = str(path)
    hint = did_you_mean(name, recipe_names()) or nearest_kind(name)
    if name in kind_names():
        raise SpaceError(f"{name} is a kind, no space; `archsearch show {name}` describes it")
    raise SpaceError(
        f"{name}: no such file, recipe or kind. Recipes: {', '.join(recipe_names())}; "
        f"kinds, which `archsearch show` describes: {', '.join(kind_names())}.{hint}"
    )


def load_recipe(name: str) -> SearchSpace:
    """The recipe itself, at its own scales."""
    return SearchSpace.load(recipe_path(name))


def baseline(name: str, space: SearchSpace) -> Candidate:
    """A recipe's layout at the scales of `space`, trained as the space trains (first option of every hole there).

    Raises SpaceError if the recipe does not fit those scales.
    """
    source = read_yaml(recipe_path(name))
    own = space.filled_once(First(), BORROWED)
    tree = {key: value for key, value in source.tree.items() if key not in (*BORROWED, "rules", "objectives", "search")}
    tree.update(own)
    unfit = f"baseline '{name}' does not fit the scales of {space.source.name}"
    try:
        recipe = SearchSpace(Source(source.name, source.text, tree, source.lines), space.base_dir)
        candidate = recipe.sample(First())
    except SpaceError as error:
        raise SpaceError([f"{unfit}: {problem}" for problem in error.problems]) from None
    refusal = recipe.refusal(candidate)
    if refusal is not None:
        raise SpaceError(f"{unfit}: {refusal.message}")
    return Candidate(candidate.architecture, candidate.train, {}, name=name)


def baselines(space: SearchSpace) -> list[Candidate]:
    """All baselines that a space names; raises SpaceError with every one that is unknown or does not fit its scales."""
    made, problems = [], []
    for i, name in enumerate(space.search.baselines):
        try:
            made.append(baseline(name, space))
        except SpaceError as error:
            where = space.source.where(("search", "baselines", i))
            problems += [f"{where}: search.baselines[{i}]: {problem}" for problem in error.problems]
    if problems:
        raise SpaceError(problems)
    return made


class First:
    """A chooser for files without holes, and for the first option of every hole."""

    def choice(self, name: str, options: object) -> int:
        return 0

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return low

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return low
