"""A driver as `archsearch launch --runner ray` is one, with trials of another module: ADDRESS SPACE.yaml MODULE"""

import sys
from pathlib import Path

from study_tools import open_folder

from archsearch.objectives import devices_of
from archsearch.progress import PlainProgress
from archsearch.runners.ray import RayRunner
from archsearch.runners.ray_cluster import Need, connect
from archsearch.space import SearchSpace
from archsearch.study import Study


def main(address: str, path: Path, module: str) -> None:
    space = SearchSpace.load(path)
    folder = open_folder(space, path.parent / "run")
    setup = {"entry": f"{module}:run", "device": "cpu", "storage": space.runtime.storage}
    places = devices_of(space.objectives)
    with folder.lock():
        timeout, devices = space.runtime.trial_timeout, {} if places else None
        runner = RayRunner(
            connect(address, "test"), Need(), setup, trial_timeout=timeout, places=places, devices=devices
        )
        study = Study(space, folder, runner, device="cpu", corpus_sha256=None, listener=PlainProgress())
        study.run()
        runner.finish()
        runner.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
