"""What all tests run under: one thread for each process of `pytest -n`, seeded searches, and what old torch says let by."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes wait for each other on few cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it, and for processes that tests start

import pytest
import torch
from hypothesis import settings

# The same examples in each run: a test cannot fail by luck. CAMFN_ANEW=1 draws new ones.
settings.register_profile("camfn", deadline=None, print_blob=True, derandomize=not os.environ.get("CAMFN_ANEW"))
settings.load_profile("camfn")


def pytest_configure(config):
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 1):
        # Old torch maps some operations (`eigh`) by a loop, and says so.
        config.addinivalue_line("filterwarnings", "ignore:There is a performance drop:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def _heap_of_other_modules():
    """Leave what earlier modules made to itself: tests that collect garbage or count objects would search all of it."""
    gc.collect()
    gc.freeze()
