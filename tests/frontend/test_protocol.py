"""The protocol, shown on a decoder that shares no code with the reference model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import liquidc
from liquidc.frontend.trace import trace
from liquidc.ir import Module, parse_module, print_module
from liquidc.ir.interpreter import Interpreter
from tests.frontend import other_model
from tests.frontend.other_model import OtherModel
from tests.oracle.reference import tolerance

IDS = torch.tensor(np.random.default_rng(7).integers(0, other_model.VOCABULARY, (2, 20)))
SIZES = {
    "num_hidden_layers": other_model.LAYERS,
    "hidden_size": other_model.WIDTH,
    "intermediate_size": other_model.EXPERT_WIDTH,
    "num_attention_heads": other_model.HEADS,
    "head_dim": other_model.HEAD_WIDTH,
}
EXACT, SINGLE = tolerance(SIZES, np.float64), tolerance(SIZES, np.float32)
"""Bounds on the error of logits, relative to the largest |logit|; its ten roundings a layer hold
here too: the parallel layer's longest path is shorter."""

Expected = tuple[Tensor, Tensor, Tensor]
"""Logits, gate_p and experts."""


@cache
def model() -> OtherModel:
    """A model with decisive gates; its linear layers' weights are large enough to matter."""
    torch.manual_seed(5)
    built = OtherModel().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
            elif name.endswith("router.weight"):
                parameter.mul_(4)
    return built


@cache
def expected() -> Expected:
    """PyTorch's whole sequences in float64, without the protocol; no decision is close to a tie."""
    exact = OtherModel().double()
    exact.load_state_dict(model().state_dict())
    with torch.no_grad():
        logits, p, experts = exact(IDS)
    assert (p - 0.5).abs().min() > 10 * SINGLE
    gates = p > 0.5
    assert all(0 < layer.double().mean() < 1 for layer in gates)
    assert sorted(experts.unique().tolist()) == [-1, 0, 1, 2, 3]
    return logits, p, experts
