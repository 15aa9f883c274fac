"""A space inside Ray Tune, with an ASHA scheduler: python examples/ray_tune.py SPACE.yaml [--trials N]

Tune's loggers, callbacks and TensorBoard work as ever. `archsearch launch` is the way to a front with its report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ray import tune
from ray.tune.schedulers import ASHAScheduler

import archsearch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("space", type=Path)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each trial")
    parser.add_argument("--results", type=Path, default=Path("runs/tune"))
    arguments = parser.parse_args()

    pair = archsearch.tune_search_space(arguments.space, reports=4, gpus=arguments.gpus)
    # ASHA judges by one metric; the searcher knows all of them, and that a stopped trial is not a finished one
    scheduler = ASHAScheduler(time_attr="training_iteration", metric=pair.metrics[0], mode=pair.modes[0], max_t=4)
    tuner = tune.Tuner(
        pair.trainable,
        tune_config=tune.TuneConfig(
            search_alg=pair.searcher,
            scheduler=scheduler,
            num_samples=arguments.trials,
            reuse_actors=True,  # or every trial starts a process and imports torch
        ),
        run_config=tune.RunConfig(name=arguments.space.stem, storage_path=str(arguments.results.absolute())),
    )
    for result in tuner.fit():
        values = "  ".join(f"{axis} {result.metrics[axis]:.4g}" for axis in pair.metrics if axis in result.metrics)
        print(result.config["arch_id"], values or result.error)


if __name__ == "__main__":
    main()
