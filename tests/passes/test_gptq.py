"""GPTQ: the paper's formula, step by step, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from liquidc.ir.quantised import Blocks, Grid, dequantise, pack
from liquidc.passes.gptq import COLUMNS, DAMPING, gptq, inverse_factor

GRIDS = [
    Grid("int4", 32, True),
    Grid("int4", 32, False),
    Grid("int4", 64, True),
    Grid("int8", 32, True),
    Grid("int4", 2 * COLUMNS, True),
    Grid("int4", 48, False),
]


def inputs(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of different sizes, f32[n, K]."""
    made = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, columns // 4, generator=made)
    mix = torch.randn(columns // 4, columns, generator=made)
    return few @ mix + 0.3 * torch.randn(tokens, columns, generator=made)


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double()


def floats(made: Blocks, grid: Grid) -> torch.Tensor:
    narrow = grid.format == "int4"
    zeros = made.zeros
    if zeros is not None and narrow:
        zeros = pack(zeros)
    return dequantise(pack(made.codes) if narrow else made.codes, made.scales, zeros, grid.format)


def weights(columns: int, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_on_the_inputs_is_smaller_than_that_of_rounding(grid: Grid) -> None:
    columns = 3 * grid.block if grid.block == 48 else 2 * max(grid.block, COLUMNS) + grid.block
    x, w = inputs(columns, 2000), weights(columns)
    calibrated = floats(gptq(w, inverse_factor(hessian(x)), grid), grid)
    nearest = floats(grid.nearest(w), grid)
    old, new = (float((x @ (w - q).T).square().sum()) for q in (nearest, calibrated))
    assert new < 0.7 * old
    # The price: weights themselves are farther away.
    assert float((w - calibrated).square().sum()) > float((w - nearest).square().sum())


def test_inputs_that_say_nothing_of_one_another_round_to_the_nearest() -> None:
    grid, w = Grid("int4", 32, True), weights(96)
    made = gptq(w, inverse_factor(torch.eye(96, dtype=torch.float64) * 5), grid)
    assert torch.equal(made.codes, grid.nearest(w).codes)
    assert torch.equal(made.scales, grid.nearest(w).scales)


def test_an_input_that_is_always_zero_rounds_to_the_nearest() -> None:
    grid, w, x = Grid("int4", 32, True), weights(64), inputs(64, 500)
    x[:, [3, 40]] = 0.0
    factor = inverse_factor(hessian(x))
    assert bool(torch.isfinite(factor).all())
    made = gptq(w, factor, grid)
    # Nothing moves column 3 and its scale is that of its block, which begins before any error.
    moved = ((w[:, 3] / made.scales[:, 0]).round() + 8).clamp(0, 15)
    assert torch.equal(made.codes[:, 0, 3].float(), moved)


def test_the_factor_is_that_of_the_inverse() -> None:
    h = hessian(inputs(48, 300))
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    u = inverse_factor(h.clone())
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.T @ u @ damped, torch.eye(48, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1]], ids=str)
def test_columns_one_by_one_as_in_the_paper(grid: Grid) -> None:
    """Algorithm 1 in numpy, errors carried to all later columns at once."""
    columns = 2 * COLUMNS + 32
    u = inverse_factor(hessian(inputs(columns, 800)))
    w, made = weights(columns), gptq(weights(columns), u, grid)
    block = grid.nearest(w[:, : grid.block])
    work, factor = w.double().numpy().copy(), u.numpy()
    for i in range(columns):
        number, first = divmod(i, grid.block)
        if first == 0:
            part = torch.from_numpy(work[:, i : i + grid.block]).float()
            block = grid.nearest(part)
        scale = block.scales[:, 0].double().numpy()
        zero = np.full_like(scale, 8.0) if block.zeros is None else block.zeros[:, 0].numpy()
        code = np.clip(np.round(work[:, i] / scale) + zero, 0, 15)
        assert np.array_equal(made.codes[:, number, first].numpy(), code), f"column {i}"
        error = (work[:, i] - (code - zero) * scale) / factor[i, i]
        work[:, i:] -= np.outer(error, factor[i, i:])


def test_rows_do_not_depend_on_one_another() -> None:
    grid, w = Grid("int4", 32, False), weights(128)
    factor = inverse_factor(hessian(inputs(128, 400)))
    whole = gptq(w, factor, grid)
    parts = [gptq(w[rows], factor, grid) for rows in (slice(0, 7), slice(7, None))]
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
