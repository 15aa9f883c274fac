"""A driver as `archsearch launch --runner ray` is one, with trials of tests/ray_faults.py: ADDRESS SPACE.yaml"""

import sys
from pathlib import Path

from study_tools import open_folder

from archsearch.progress import PlainProgress
from archsearch.runners.ray import RayRunner
from archsearch.runners.ray_cluster import Need, connect
from archsearch.space import SearchSpace
from archsearch.study import Study


def main(address: str, path: Path) -> None:
    space = SearchSpace.load(path)
    folder = open_folder(space, path.parent / "run")
    setup = {"entry": "ray_faults:run", "device": "cpu", "storage": space.runtime.storage}
    with folder.lock():
        runner = RayRunner(connect(address), Need(), setup, trial_timeout=space.runtime.trial_timeout)
        study = Study(space, folder, runner, device="cpu", corpus_sha256=None, listener=PlainProgress())
        study.run()
        runner.finish()
        runner.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
