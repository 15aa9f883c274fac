"""Times whole models on a device that nobody else trains on meanwhile, and reads how much memory they take.

`lock` needs no torch; `measure` and `memory` do, so nothing is imported here.
"""
