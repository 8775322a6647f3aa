"""Settings of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: tests run side by side, and the models are tiny

from hypothesis import settings

settings.register_profile("usual", deadline=None)
settings.load_profile("usual")
settings.register_profile("long", max_examples=2_000, deadline=None)  # pytest --hypothesis-profile=long
