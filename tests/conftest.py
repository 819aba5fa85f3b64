"""Old torch maps some operations (`eigh`) by a loop, and says so."""

import torch


def pytest_configure(config):
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 1):
        config.addinivalue_line("filterwarnings", "ignore:There is a performance drop:UserWarning")
