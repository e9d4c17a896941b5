"""GPTQ (Frantar et al. 2023): columns are rounded one by one, later ones make up for their errors.

The weight of a product y = W x is rounded so that ‖W X − W' X‖ is small on calibration inputs X,
not ‖W − W'‖. With H = X Xᵀ + λI and U the upper Cholesky factor of H⁻¹, column i is rounded to q_i
and every column j > i moves by −(w_i − q_i) · U_ij / U_ii (algorithm 1 of the paper).
"""

from __future__ import annotations

import torch

from liquidc.ir.quantised import BITS, ZERO, Blocks, Grid

DAMPING = 0.01
"""λ as a share of H's mean diagonal, as in the paper."""
COLUMNS = 128
"""Columns, about, whose errors are carried over at once; the result does not depend on it."""


def gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid) -> Blocks:
    """Round f32[N, K] with regard to its inputs; rows do not depend on one another.

    Args:
        weight: the weight.
        factor: of its inputs, as `inverse_factor` gives it.
        grid: formats int4 and int8.
    """
    w = weight.double()
    rows, columns = w.shape
    levels = 2 ** BITS[grid.format] - 1
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(rows, columns // grid.block)
    zeros = torch.full_like(scales, ZERO[grid.format])
    step = grid.block * max(1, COLUMNS // grid.block)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = torch.zeros(rows, stop - start, dtype=torch.float64)
        for i in range(start, stop):
            number, first = divmod(i, grid.block)
            if first == 0:
                made = grid.nearest(w[:, i : i + grid.block].float())
                scales[:, number] = made.scales[:, 0]
                if made.zeros is not None:
                    zeros[:, number] = made.zeros[:, 0]
            scale, zero = scales[:, number].double(), zeros[:, number].double()
            code = (torch.round(w[:, i] / scale) + zero).clamp(0, levels)
            codes[:, i] = code.to(torch.uint8)
            error = (w[:, i] - (code - zero) * scale) / factor[i, i]
            errors[:, i - start] = error
            w[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    blocks = codes.unflatten(-1, (-1, grid.block))
    return Blocks(blocks, scales, None if grid.symmetric else zeros.to(torch.uint8))


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with Uᵀ U = (H + λI)⁻¹ of f64[K, K]; `hessian` is overwritten.

    An input that is always 0 has a column of its own in H, so that its weights are rounded to the
    nearest.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += DAMPING * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
