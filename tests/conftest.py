"""One CPU thread for every test: shapes are tiny, two test processes run at once, and thread pools would fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, mended before anything imports triton
    import triton_interpreter  # noqa: F401
