"""Trials of ray_faults.py that take twelve seconds: long enough for a driver to be killed and started again."""

import ray_faults

ray_faults.STEPS = 100
run = ray_faults.run
