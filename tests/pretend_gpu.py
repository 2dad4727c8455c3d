"""A plugin of pytest: PyTorch says that there is a GPU, from the start. Tests that use one fail with it."""

import torch

torch.cuda.is_available = lambda: True
