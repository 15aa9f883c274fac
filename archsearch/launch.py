"""`archsearch launch`: open or resume a run folder, start workers, run the study, write front and report."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from archsearch import machine
from archsearch.architecture import Architecture, dump
from archsearch.choosers import RandomChooser, drawn
from archsearch.data import Corpus, open_corpus, tokenizer_json
from archsearch.errors import RunError, SpaceError
from archsearch.extend import extend
from archsearch.latency.room import bench_bytes, too_big, train_bytes
from archsearch.launch_ray import Wanted, start_ray
from archsearch.objectives import axis_name, devices_of, direction, objective, scale_of
from archsearch.recipes import baselines
from archsearch.report import write_report
from archsearch.runners import Runner
from archsearch.runners.local import LocalRunner
from archsearch.settings import Goal, Runtime
from archsearch.space import Candidate, SearchSpace
from archsearch.store import RunFolder, environment
from archsearch.store.disk import explained
from archsearch.store.provenance import cpu_model
from archsearch.study import Listener, Study

N_DRAWN = 32  # candidates that are looked at, before the first trial, for whether any fits the device
DIFFERS = "differs from the reference"  # how a tuning names a block whose kernels are wrong


@dataclass(frozen=True)
class Options:
    """What the command line adds to a space: where to run, how many candidates, on what."""

    run_dir: Path = Path("runs")
    trials: int | None = None
    workers: int | None = None
    device: str | None = None
    extend: bool = False
    runner: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"--{name} is {value}; expected 1 or more")


@dataclass(frozen=True)
class Launched:
    """How a launch ended."""

    folder: RunFolder
    interrupted: bool


def launch(space: SearchSpace, options: Options, listener: Listener) -> Launched:
    """Run a space to its end, or go on with it; Ctrl-C and SIGTERM stop cleanly and leave a folder that resumes.

    Raises RunError if the folder is in use, or holds another space and `options.extend` is not set, or if a disk takes
    no more, which the same command goes on from.
    """
    folder = RunFolder(options.run_dir / space.name)
    runtime = space.runtime
    on_ray = (options.runner or runtime.runner) == "ray" or options.address is not None
    if on_ray and options.runner == "local":
        raise RunError("--address is a Ray cluster's; leave --runner local out")
    device, gpus = (None, ()) if on_ray else choose_device(options.device or runtime.device)
    if device is not None:
        check_kind(devices_of(space.objectives), gpus)
        check_room(space, folder, gpus, listener)
    with folder.lock(), _terminable(), explained(folder.path):
        corpus = open_corpus(space.task, space.base_dir)
        for remark in (corpus.meta.loss, corpus.meta.left_out and f"corpus: {corpus.meta.left_out}"):
            if remark:
                listener.note(remark)
        if folder.exists:
            _resume(space, folder, corpus, options, listener)
        else:
            create(space, folder, corpus)
        runner: Runner
        if device is None:
            wanted = Wanted(options.address, options.workers, options.device)
            runner, device = start_ray(space, folder, wanted, corpus.sha256)
        else:
            if gpus:
                tune_kernels(runtime, space.vocab_size, folder, gpus[0], listener)
            runner = start_runner(runtime, folder, options.workers, gpus)
        interrupted = False
        try:
            study = Study(
                space,
                folder,
                runner,
                device="cuda:0" if device == "cuda" else device,
                corpus_sha256=corpus.sha256,
                n_trials=1 if _is_one(space) else options.trials,
                listener=listener,
            )
            study.run()
            runner.finish()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            runner.close()
        write_report(folder)
    return Launched(folder, interrupted)


def create(space: SearchSpace, folder: RunFolder, corpus: Corpus) -> None:
    """Lay out a fresh run folder, which keeps the tokenizer: text, packed folders and their paths may go."""
    meta = corpus.meta
    made_with = {"name": meta.tokenizer, "sha256": meta.tokenizer_sha256, "loss": meta.loss}
    folder.create(
        space_yaml=space.source.text,
        space=space.tree,
        settings=settings_of(space),
        environment={
            **environment(corpus_sha256=corpus.sha256, repository=space.base_dir),
            "tokenizer": made_with,
        },
        tokenizer=tokenizer_json(corpus, space.task, space.base_dir),
    )


def settings_of(space: SearchSpace) -> dict[str, Any]:
    """What later steps (report, export) need to know of a space without reading it again."""
    goals = space.objectives
    return {
        "name": space.name,
        "description": space.description,
        "objectives": [
            {
                "name": axis_name(goal, goals),
                "goal": direction(goal),
                "unit": objective(goal).unit,
                "scale": scale_of(goal),
                "context": goal.at.context,
                "batch": goal.at.batch,
                "device": goal.at.device,
                "limit": goal.limit,
            }
            for goal in goals
        ],
        "task": space.task.model_dump(mode="json"),
        "train": space.tree.get("train", {}),
        "search": space.search.model_dump(mode="json"),
        "runtime": dump(space.runtime),
        "scales": space.tree["scales"],
        "rules": [rule.text for rule in space.rules],
    }


def _resume(space: SearchSpace, folder: RunFolder, corpus: Corpus, options: Options, listener: Listener) -> None:
    """Refuse what does not fit the folder: another space (unless it is to be extended), another corpus."""
    known = folder.read_json("environment.json")["corpus_sha256"]
    if known != corpus.sha256:
        raise RunError(
            f"{folder.path} was run on a corpus with sha256 {known[:12]}, this one has {corpus.sha256[:12]}: their "
            "losses do not compare. Give the space another name, or bring the old corpus back"
        )
    if folder.read_json("space.json") == space.tree:
        return
    if not options.extend:
        before = (folder.path / "space.yaml").read_text().splitlines()
        diff = difflib.unified_diff(before, space.source.text.splitlines(), "the run's", "now", lineterm="", n=1)
        raise RunError(
            f"{space.source.name} is not the space that {folder.path} was started with:\n"
            + "\n".join(diff)
            + "\ngive it another name, or launch with --extend to keep the trials that are still inside it"
        )
    listener.note(extend(space, folder, settings_of(space)).text())


def choose_device(wanted: str | None) -> tuple[str, tuple[int, ...]]:
    """The device kind and the indices of its GPUs; asks the driver, so that this process needs no torch.

    Raises RunError for a device that is not there.
    """
    gpus = _gpus()
    if wanted is None:
        return ("cuda", gpus) if gpus else ("cpu", ())
    if wanted == "cpu":
        return "cpu", ()
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise RunError(f"unknown device '{wanted}'; expected cpu, cuda or cuda:<index>")
    if not gpus or (index and int(index) not in gpus):
        raise RunError(f"device '{wanted}' is not there; found {len(gpus)} CUDA device(s)")
    return "cuda", (int(index),) if index else gpus


def _gpus() -> tuple[int, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        listed = [part.strip() for part in visible.split(",")]
        return tuple(int(part) for part in listed if part.isdigit())
    if shutil.which("nvidia-smi") is None:
        return ()
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return tuple(range(sum(line.startswith("GPU ") for line in done.stdout.splitlines())))


def check_kind(named: tuple[str, ...], gpus: tuple[int, ...]) -> None:
    """Raise RunError if objectives are to be measured on a device that this machine is not."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not named:
        return
    here = [cpu_model()]
    if gpus:
        names = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        here = list(dict.fromkeys(names[gpu].strip() for gpu in gpus if gpu < len(names)))
    for kind in named:
        if len(named) > 1 or not all(kind.lower() in name.lower() for name in here):
            raise RunError(
                f"objectives are to be measured on {' and '.join(named)}, and this machine has {', '.join(here)}; "
                "leave `device` out, or launch on a cluster that has them (--runner ray --address ...)"
            )


def check_room(space: SearchSpace, folder: RunFolder, gpus: tuple[int, ...], listener: Listener) -> None:
    """Say before the first trial that none will fit the device; raise RunError if the space has but one and no run yet.

    Of a space with holes some candidates are drawn and the baselines looked at: others may be smaller.
    """
    room = _room(gpus)
    if room is None:
        return
    drawn = [*_drawn(space), *baselines(space)]
    over = [found for candidate in drawn if (found := _over(candidate.architecture, space.objectives, room))]
    if not drawn or len(over) < len(drawn):
        return
    _, why = min(over)
    if len(drawn) > 1 or folder.exists:
        listener.note(f"of {len(drawn)} candidates looked at none fits this device; the smallest: {why}")
        return
    raise RunError(
        f"{space.source.name}: {why}. Make that scale smaller, measure at another (at: {{scale: proxy}}), or launch "
        "where there is more memory"
    )


def _drawn(space: SearchSpace) -> list[Candidate]:
    """Random candidates that pass the rules; the one there is if the space has no holes."""
    seeds = range(1 if _is_one(space) else N_DRAWN)
    return [candidate for candidate in drawn(space, seeds) if space.refusal(candidate) is None]


def _is_one(space: SearchSpace) -> bool:
    """Whether a space leaves nothing to choose; it has one candidate then, however many are asked for."""
    chooser = RandomChooser(0)
    try:
        space.sample(chooser)
    except SpaceError:
        return False
    return chooser.branching == 1


def _over(architecture: Architecture, goals: tuple[Goal, ...], room: int) -> tuple[int, str] | None:
    """The first thing of a trial that takes more than `room` bytes: how many, and a sentence."""
    for goal in goals:
        if objective(goal).stage == "bench":
            scale = scale_of(goal)
            model = architecture.at(scale)
            least = bench_bytes(model, goal.name, goal.at.context, goal.at.batch)
            if least > room:
                return least, too_big(model, f"{goal.name} at {scale} scale", least, room)
    proxy = architecture.at("proxy")
    if any(objective(goal).stage == "trained" for goal in goals) and (least := train_bytes(proxy)) > room:
        return least, too_big(proxy, "training at proxy scale", least, room)
    return None


def _room(gpus: tuple[int, ...]) -> int | None:
    """Bytes of the largest of these GPUs, or what the machine has free; None where nobody tells."""
    if not gpus:
        return machine.free_memory()
    sizes = machine.gpu_memory()
    return machine.largest([sizes[gpu] if gpu < len(sizes) else None for gpu in gpus])


def start_runner(runtime: Runtime, folder: RunFolder, workers: int | None, gpus: tuple[int, ...]) -> LocalRunner:
    """One worker per GPU; on the CPU one per two cores, each with an equal share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or runtime.workers or (len(gpus) if gpus else max(1, cores // 2))
    return LocalRunner(
        count,
        folder.path / "logs",
        threads=runtime.threads or max(1, cores // count),
        devices=gpus,
        trial_timeout=runtime.trial_timeout,
        memory_limit=runtime.memory_limit,
    )


def tune_kernels(runtime: Runtime, vocab_size: int, folder: RunFolder, gpu: int, listener: Listener) -> None:
    """Time what the space can launch and no table knows, before any trial runs; workers then only look it up.

    In a process of its own, so that this one needs no torch, and which needs no data: their paths may be relative to
    where the space came from. A tuning that fails costs speed, not the study: it is
    noted, and the kernels run in their defaults. But where a block's kernels differ from the reference whatever their
    configuration, the whole study runs on the reference (unless ARCHSEARCH_KERNELS says otherwise): slow, and right.
    """
    mode = os.environ.get("ARCHSEARCH_TUNE") or runtime.tune
    os.environ["ARCHSEARCH_TUNE"] = "off" if mode == "off" else "cached"
    if mode not in ("quick", "full") or find_spec("triton") is None:
        return
    command = [sys.executable, "-m", "archsearch", "tune", str(folder.path / "space.yaml"), "--json"]
    command += ["--vocab-size", str(vocab_size), "--budget", str(runtime.tune_budget)]
    command += ["--full"] if mode == "full" else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    with (folder.path / "tuning.log").open("ab") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode != 0:
        listener.note(f"kernels were not tuned (exit code {done.returncode}); see {folder.path / 'tuning.log'}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    if found["tuned"] or found["left"] or found["failures"]:
        left = f", {found['left']} left for later" if found["left"] else ""
        failed = f", {len(found['failures'])} failed (tuning.log)" if found["failures"] else ""
        listener.note(f"kernels: {found['tuned']} launches tuned in {found['seconds']:.0f} s{left}{failed}")
    wrong = [failure for failure in found["failures"] if DIFFERS in failure]
    if wrong and os.environ.setdefault("ARCHSEARCH_KERNELS", "reference") == "reference":
        listener.note(f"the study runs without kernels, because they are wrong here: {wrong[0]}")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C: workers stopped, report written."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
