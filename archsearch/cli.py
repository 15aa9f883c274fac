"""The command line: each command parses its arguments and makes one call. Heavy packages load where they are used."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch import __version__
from archsearch.errors import RunError, UserError

if TYPE_CHECKING:
    from archsearch.store import TrialRecord

PICKS = "knee, front:<number>, best:<objective>, best:<objective>:<other>=<bound>, an arch_id or a trial number"
EXAMPLES = """examples:
  archsearch check search_spaces/quickstart.yaml     what the space holds, before any training
  archsearch launch search_spaces/quickstart.yaml    search; the same command resumes after a stop
  archsearch front runs/quickstart                   the front as a table
  archsearch export runs/quickstart --pick knee -o best/    the best compromise as model code with weights
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 nothing found by a search, 2 something to mend, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    try:
        code: int = arguments.run(arguments)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `archsearch ... | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archsearch",
        description="Search hybrid LLM layouts for the best quality at the latency you can afford.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"archsearch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    launch = commands.add_parser("launch", help="run a search, or go on with one")
    launch.add_argument("space", type=Path, help="the space's YAML file, or the name of a recipe")
    launch.add_argument("--run-dir", type=Path, default=Path("runs"), help="where run folders lie (default: runs)")
    launch.add_argument("--trials", type=int, help="candidates to run (default: search.trials)")
    launch.add_argument("--workers", type=int, help="worker processes (default: one per GPU, or per two cores)")
    launch.add_argument("--runner", choices=("local", "ray"), help="where trials run (default: runtime.runner)")
    launch.add_argument("--address", help="the Ray cluster: auto or host:port (default: one of its own)")
    launch.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    launch.add_argument("--extend", action="store_true", help="the space changed: keep the trials still inside it")
    launch.add_argument("--json", action="store_true", help="one JSON line per trial")
    launch.set_defaults(run=_launch)

    check = commands.add_parser("check", help="validate a space and say what it holds")
    check.add_argument("space", type=Path)
    check.add_argument("--json", action="store_true")
    check.set_defaults(run=_check)

    show = commands.add_parser("show", help="draw an architecture")
    show.add_argument("what", type=Path, help="a space or recipe, a run folder, or a kind of mixer or FFN")
    show.add_argument("--pick", default=None, help=f"in a run: {PICKS}")
    show.add_argument("--scale", choices=("proxy", "target"), default="proxy")
    show.add_argument("--seed", type=int, help="which random candidate of a space with holes (default: 0)")
    show.add_argument("--svg", type=Path, metavar="FILE", help="write an SVG instead of text")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=_show)

    front = commands.add_parser("front", help="print the front of a run")
    front.add_argument("run_folder", type=Path)
    front.add_argument("--json", action="store_true")
    front.set_defaults(run=_front)

    report = commands.add_parser("report", help="write front.json, front.csv, front.png and report.html anew")
    report.add_argument("run_folder", type=Path)
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="write a trial as model code with its weights")
    export.add_argument("run_folder", type=Path)
    export.add_argument("--pick", default="knee", help=f"{PICKS} (default: knee)")
    export.add_argument("--scale", choices=("proxy", "target"), default="proxy", help="proxy: trained weights")
    export.add_argument(
        "--format",
        default="torch",
        help="torch (default): one file; hf: a folder for transformers with the layout's own code; or a folder for a "
        "stock class: fla, qwen3_next, gemma3, jamba, lfm2, lfm2_moe, falcon_h1",
    )
    export.add_argument("--init", action="store_true", help="fresh initial weights (default at target scale: none)")
    export.add_argument(
        "--kernels",
        choices=("none", "installed", "vendored"),
        default="installed",
        help="Triton kernels of torch, hf: archsearch_kernels if it is there (default), a copy in the folder, or none",
    )
    export.add_argument("--name", help="of the model, a Python identifier (default: the study's and the arch_id)")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    export.set_defaults(run=_export)

    tune = commands.add_parser("tune", help="time the kernels that a space can launch, once, for every later run")
    tune.add_argument("space", type=Path, nargs="?", help="a space or recipe (default: all recipes)")
    tune.add_argument("--budget", default=None, metavar="60s", help="stop after this long (default: when done)")
    tune.add_argument("--full", action="store_true", help="time every candidate, not the most promising only")
    tune.add_argument("--explain", action="store_true", help="say which configuration each kernel runs in, and why")
    tune.add_argument("--vocab-size", type=int, metavar="N", help="of the tokenizer (default: the space's data say)")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write what was measured on this device as a pack")
    tune.add_argument("--import", dest="pack", type=Path, metavar="FILE", help="add a pack to this user's tables")
    tune.add_argument("--json", action="store_true")
    tune.set_defaults(run=_tune)

    recipes = commands.add_parser("recipes", help="list the published hybrids that come along")
    recipes.add_argument("name", nargs="?", help="print this recipe's YAML")
    recipes.add_argument("--json", action="store_true")
    recipes.set_defaults(run=_recipes)

    data = commands.add_parser("data", help="corpora")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    pack = actions.add_parser("pack", help="pack text into token files once, for many studies")
    pack.add_argument("corpus", help="builtin, shakespeare, or paths, folders, globs (.txt .py .jsonl .parquet .bin)")
    pack.add_argument("--tokenizer", default="bytes", help="bytes (default) or a tokenizer.json")
    pack.add_argument("-o", "--output", type=Path, metavar="DIR", help="name it as task.corpus (default: the cache)")
    pack.add_argument("--json", action="store_true")
    pack.set_defaults(run=_pack)
    return parser


def _load(path: Path, vocab_size: int | None = None) -> Any:
    """A space from a file, or a recipe by its name."""
    from archsearch.recipes import load_space, recipe_names, recipe_path

    with _named(path):
        if not path.exists() and path.suffix == "" and str(path) in recipe_names():
            path = recipe_path(str(path))
    return load_space(path, vocab_size)


def _open_run(path: Path, command: str) -> Any:
    """A run folder; whoever names a space instead is told where its run lies."""
    from archsearch.space.yaml_source import read_yaml
    from archsearch.store import RunFolder

    with _named(path):
        is_file = path.is_file()
    if is_file:
        tree = None
        with suppress(UserError):
            tree = read_yaml(path).tree
        name = tree.get("name") if isinstance(tree, dict) else None
        run = Path("runs") / str(name or "<name>")
        hint = f"its run is {run}: archsearch {command} {run}"
        if not RunFolder(run).exists:
            hint = f"launched, its run lies in {run}, or where --run-dir says"
        raise RunError(f"{path} is a file; expected a run folder. If it is a space, {hint}")
    return RunFolder.open(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the file system refuses of a path that a person named, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _launch(arguments: argparse.Namespace) -> int:
    from archsearch.launch import Options, launch
    from archsearch.progress import shown

    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    space = _load(arguments.space)
    with shown(arguments.json) as listener:
        done = launch(space, options, listener)
    path = done.folder.path
    records = done.folder.records()
    n_complete = sum(record.status == "complete" for record in records)
    if arguments.json:
        end = {"run": str(path), "interrupted": done.interrupted, "complete": n_complete}
        print(json.dumps({"event": "end", **end}))
    else:
        print(_summary(records, done.folder.read_json("settings.json")))
        print(f"report: {path / 'report.html'}")
    if done.interrupted:
        print(f"stopped; the same command resumes: {shlex.join(['archsearch', *arguments.words])}", file=sys.stderr)
        return 130
    if not n_complete:
        print(f"no trial was completed, so that there is no front: archsearch front {path} says why", file=sys.stderr)
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from archsearch.check import check_space

    found = check_space(_load(arguments.space))
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.text())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from archsearch.describe import describe_kind, kind_names
    from archsearch.draw import one_line, svg, table
    from archsearch.report.picks import written

    with _named(arguments.what):
        is_run = arguments.what.is_dir()
        is_kind = str(arguments.what) in kind_names() and not arguments.what.exists()
    if is_kind:
        print(describe_kind(str(arguments.what)))
        return 0
    if is_run and arguments.seed is not None:
        raise RunError("--seed draws a candidate of a space; of a run, --pick says which trial")
    if not is_run and arguments.pick is not None:
        raise RunError(f"--pick chooses a trial of a run, and {arguments.what} is none; of a space, --seed draws one")
    if is_run:
        from archsearch.architecture import Architecture
        from archsearch.export.pick import pick

        folder = _open_run(arguments.what, "show")
        record = pick(folder.records(), folder.read_json("settings.json"), arguments.pick or "knee")
        architecture, title = Architecture.from_json(record.architecture), record.name or record.arch_id
        holes = record.holes
    else:
        from archsearch.choosers import RandomChooser

        space = _load(arguments.what)
        candidate = space.sample(RandomChooser(arguments.seed or 0))
        architecture, holes = candidate.architecture, candidate.holes
        title = f"{space.name}, {architecture.arch_id}"
    model = architecture.at(arguments.scale)
    if arguments.svg is not None:
        with _named(arguments.svg):
            arguments.svg.write_text(svg(model, f"{title}, {arguments.scale} scale"))
        print(arguments.svg)
    elif arguments.json:
        print(
            json.dumps({"arch_id": architecture.arch_id, "scale": arguments.scale, "model": model.to_json()}, indent=2)
        )
    else:
        print(f"{title}, {arguments.scale} scale: {one_line(model)}\n\n{table(model)}")
        if holes:
            print("\n" + "\n".join(written(holes)))
    return 0


def _front(arguments: argparse.Namespace) -> int:
    from archsearch.report import build_front
    from archsearch.report.front import front_json
    from archsearch.report.trust import certificate

    folder = _open_run(arguments.run_folder, "front")
    records, settings = folder.records(), folder.read_json("settings.json")
    if arguments.json:
        front = build_front(records, settings)
        trust = certificate(front, settings, folder.read_json("environment.json"))
        print(json.dumps(front_json(front, trust), indent=2))
    else:
        print(_summary(records, settings))
    return 0


def _summary(records: Sequence[TrialRecord], settings: Mapping[str, Any]) -> str:
    from archsearch.report import summary

    return summary(records, settings, width=shutil.get_terminal_size().columns)


def _report(arguments: argparse.Namespace) -> int:
    from archsearch.report import write_report

    folder = _open_run(arguments.run_folder, "report")
    write_report(folder)
    print(folder.path / "report.html")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from archsearch.export import export_run

    out = export_run(
        _open_run(arguments.run_folder, "export").path,
        arguments.pick,
        arguments.scale,
        arguments.output,
        arguments.name,
        format=arguments.format,
        kernels=arguments.kernels,
        fresh=arguments.init,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(out)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from archsearch.kernel_tuning import explain, export_pack, import_pack, tune

    if arguments.pack is not None:
        with _named(arguments.pack):
            print(f"{import_pack(arguments.pack)} rows from {arguments.pack}")
        return 0
    if arguments.export is not None and arguments.space is None:
        with _named(arguments.export):
            print(f"{export_pack(arguments.export)} rows to {arguments.export}")
        return 0
    spaces = _every_space() if arguments.space is None else [_load(arguments.space, arguments.vocab_size)]
    if arguments.explain:
        found = explain(spaces)
        print(json.dumps(found, indent=2) if arguments.json else "\n".join(f"{name:40s} {why}" for name, why in found))
        return 0
    done = tune(spaces, arguments.budget, full=arguments.full, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(done.to_json()) if arguments.json else done.text())
    if arguments.export is not None:
        with _named(arguments.export):
            print(f"{export_pack(arguments.export)} rows to {arguments.export}")
    return 0


def _every_space() -> list[Any]:
    from archsearch.recipes import load_recipe, recipe_names

    return [load_recipe(name) for name in recipe_names()]


def _recipes(arguments: argparse.Namespace) -> int:
    from archsearch.draw import one_line
    from archsearch.recipes import First, load_recipe, recipe_names, recipe_path

    if arguments.name is not None:
        print(recipe_path(arguments.name).read_text(), end="")
        return 0
    spaces = {name: load_recipe(name) for name in recipe_names()}
    if arguments.json:
        print(json.dumps({name: space.description for name, space in spaces.items()}, indent=2))
        return 0
    for name, space in spaces.items():
        layout = one_line(space.sample(First()).architecture.at("target"))
        print(f"{name:<14} {(space.description or '').strip()}\n{'':<14} {layout}")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from archsearch.data import pack
    from archsearch.data.cache import cache_dir

    packed = pack(arguments.corpus, arguments.tokenizer, Path.cwd(), arguments.output)
    if packed.meta.loss:
        print(f"warning: {packed.meta.loss}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(packed.to_json(), indent=2))
        return 0
    print(packed.summary())
    if cache_dir() in packed.folder.parents:
        print("  in a space the same task.corpus and task.tokenizer; it is found in the cache")
    else:
        print(f"  in a space task: {{corpus: {json.dumps(str(packed.folder), ensure_ascii=False)}}}")
    return 0
