"""One thread per process: the tensors of tests are tiny, and threads that wait for each other only cost."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread():
    """What a test makes of the number of torch's threads does not outlive it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
