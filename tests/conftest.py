"""One CPU thread for every test: shapes are tiny, two test processes run at once, and thread pools would fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
