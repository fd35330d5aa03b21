"""One thread per process: the tensors of tests are tiny, and threads that wait for each other only cost."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
