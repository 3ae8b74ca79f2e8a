"""FP8 with a scale for each block, in PyTorch: what Transformer Engine's casts of its blockwise and mxfp8 recipes do.

A block is 1 x 128 numbers of a row, or 128 x 128 of a weight (blockwise: float32 scales, by default powers of 2), or
1 x 32 (mxfp8: scales are exponents in a byte). A tensor is cast twice: by rows, and for products over its other
dimension by columns. Layouts of data and scales as in ``transformer_engine/pytorch/tensor/float8_blockwise_tensor.py``
and ``transformer_engine/pytorch/tensor/mxfp8_tensor.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BIAS = 127
"""Of the exponents of mxfp8."""


def quantize_blocks(tensor: Tensor, quantizer: Any, output: Any, dtype: torch.dtype) -> None:
    """Into what ``output`` has room for: by rows, by columns, or both."""
    x_MK = tensor.detach().float().flatten(0, -2)
    if output._rowwise_data is not None:
        data_MK, scales = _cast(x_MK, quantizer, dtype)
        output._rowwise_data.copy_(data_MK.view(output._rowwise_data.shape))
        transposed = _is_blockwise(quantizer) and quantizer.block_scaling_dim == 1 and _gemm_ready(output)
        _store(output._rowwise_scale_inv, scales.T if transposed else scales)
    if output._columnwise_data is not None:
        data_KM, scales = _cast(x_MK.T.contiguous(), quantizer, dtype)
        data = data_KM if _is_transposed(output) else data_KM.T
        output._columnwise_data.copy_(data.reshape(output._columnwise_data.shape))
        by_blocks = _is_blockwise(quantizer) and quantizer.block_scaling_dim == 2
        _store(output._columnwise_scale_inv, scales if by_blocks else scales.T)


def plain_blocks(tensor: Any, dtype: torch.dtype, *, columnwise: bool) -> Tensor:
    """What one of the two casts stands for, in float32 and the tensor's own shape."""
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    assert data is not None, "a GPU's product would lack this side of an FP8 tensor"
    scales = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    blockwise = hasattr(tensor, "_is_2D_scaled")
    by_blocks = blockwise and tensor._is_2D_scaled
    transposed = columnwise and _is_transposed(tensor)
    shape = (*data.shape[1:], data.shape[0]) if transposed else tuple(data.shape)
    values = data.view(dtype).float()
    rows = values.flatten(1) if transposed else values.flatten(0, -2)
    if columnwise and not transposed:
        rows = rows.T
    if (columnwise and not by_blocks) or (blockwise and not by_blocks and not columnwise and _gemm_ready(tensor)):
        scales = scales.T
    height, width = (128, 128) if by_blocks else (1, 128 if blockwise else 32)
    used = scales[: -(-rows.shape[0] // height), : -(-rows.shape[1] // width)]
    if not blockwise:
        used = torch.exp2(used.float() - _BIAS)
    spread = used.repeat_interleave(height, 0).repeat_interleave(width, 1)[: rows.shape[0], : rows.shape[1]]
    whole = rows * spread
    return (whole.T if columnwise else whole).reshape(shape)


def _cast(x_MK: Tensor, quantizer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bytes [M, K], and inverse scales [blocks of M, blocks of K]."""
    blockwise = _is_blockwise(quantizer)
    height = 128 if blockwise and quantizer.block_scaling_dim == 2 else 1
    width = 128 if blockwise else 32
    rows, columns = x_MK.shape
    assert blockwise or columns % width == 0
    padded = torch.nn.functional.pad(x_MK, (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = blocks.abs().amax((1, 3))
    largest = torch.finfo(dtype).max
    if blockwise:
        assert not quantizer.amax_epsilon
        scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
        if quantizer.force_pow_2_scales:
            scale = torch.exp2(scale.log2().floor())
        kept = 1 / scale
    else:
        exponents = torch.where(amax > 0, (amax / largest).log2().ceil(), torch.full_like(amax, -_BIAS))
        exponents = exponents.clamp(-_BIAS, _BIAS)
        scale, kept = torch.exp2(-exponents), (exponents + _BIAS).to(torch.uint8)
    scaled = (blocks * scale[:, None, :, None]).clamp(-largest, largest).view(padded.shape)[:rows, :columns]
    return scaled.to(dtype).view(torch.uint8), kept


def _store(into: Tensor, scales: Tensor) -> None:
    """Scales lie at the start of a buffer that is padded for the products."""
    into.zero_()
    into[: scales.shape[0], : scales.shape[1]] = scales


def _is_blockwise(quantizer: Any) -> bool:
    return hasattr(quantizer, "block_scaling_dim")


def _gemm_ready(tensor: Any) -> bool:
    return tensor._data_format.name == "GEMM_READY"


def _is_transposed(tensor: Any) -> bool:
    """Data by columns: [K, ...] where products of this generation read along the last dimension alone."""
    return hasattr(tensor, "_is_2D_scaled") and (tensor._is_2D_scaled or _gemm_ready(tensor))
