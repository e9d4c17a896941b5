"""One thread per test process: the tests run beside one another."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
