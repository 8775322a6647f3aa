"""Settings of all tests."""

import torch
from hypothesis import settings

settings.register_profile("usual", deadline=None)
settings.load_profile("usual")
settings.register_profile("long", max_examples=2_000, deadline=None)  # pytest --hypothesis-profile=long
torch.set_num_threads(1)
