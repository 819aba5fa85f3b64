"""The profile of the property-based tests."""

import os

from hypothesis import settings

settings.register_profile("camfn", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("camfn")
