"""Transformer Engine's compiled functions in PyTorch: what ``transformer_engine_torch`` is made of on a CPU.

Only what a kernel computes stands in: matrix products, norms, casts to FP8, the update of scales. Shapes of products as
in ``transformer_engine/pytorch/cpp_extensions/gemm.py``: "TN" is B A^T, "NN" is B A, "NT" is B^T A.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import torch
import torch.distributed as dist
from te_attention import (  # noqa: F401
    fused_attn_bwd,
    fused_attn_fwd,
    thd_grad_correction,
    thd_out_correction,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    thd_second_half_lse_correction,
)
from te_blocks import plain_blocks, quantize_blocks
from torch import Tensor

DType = Enum(
    "DType",
    "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 kFloat4E2M1",
)
FP8FwdTensors = IntEnum(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    start=0,
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors",
    "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    start=0,
)
Float8BlockScaleTensorFormat = Enum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT")
NVTE_Fused_Attn_Backend = IntEnum(
    "NVTE_Fused_Attn_Backend",
    "NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
)
CommOverlapType = Enum("CommOverlapType", "RS AG")


def _dtype(te_dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType  # pyright: ignore[reportMissingImports]

    return next(ours for ours, theirs in TE_DType.items() if theirs == te_dtype and ours != torch.uint8)


def _fp8(te_dtype: Any) -> torch.dtype:
    return torch.float8_e5m2 if "E5M2" in str(te_dtype) else torch.float8_e4m3fn


def _plain(tensor: Any, *, columnwise: bool = False) -> Tensor:
    """What a quantized tensor stands for, in float32; others as they are, in at least float32."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if hasattr(tensor, "_rowwise_data"):
        return plain_blocks(tensor, _fp8(tensor._fp8_dtype), columnwise=columnwise)
    data = tensor._data
    if data is None:
        transposed = tensor._transpose.view(_fp8(tensor._fp8_dtype)).float()
        data_MN = transposed.movedim(0, -1)
    else:
        data_MN = data.view(_fp8(tensor._fp8_dtype)).float()
    return data_MN * tensor._scale_inv.float()


def _check_usage(tensor: Any, *, transposed: bool) -> None:
    if not hasattr(tensor, "_fp8_dtype") or hasattr(tensor, "_rowwise_data"):
        return  # the latter is cast twice, and taken apart by side
    data, transpose = tensor._data, None if tensor._transpose_invalid else tensor._transpose
    assert (transpose if transposed else data) is not None, "a GPU's product would lack this side of an FP8 tensor"
    if data is not None and transpose is not None:
        assert torch.equal(data.flatten(0, -2).T.reshape(transpose.shape), transpose), "a stale transpose"


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    **_: Any,
) -> tuple[Any, ...]:
    """(product, gradient of the bias, None, None)."""
    assert not gelu
    assert quantizer is None
    assert alpha == 1.0
    assert beta in (None, float(accumulate))
    # Hopper multiplies FP8 along the last dimension of both alone: the other way round it takes a transpose.
    _check_usage(A, transposed=not transa)
    _check_usage(B, transposed=transb)
    a, b = _plain(A, columnwise=not transa), _plain(B, columnwise=transb)
    if transb:  # over all tokens
        product = b.flatten(0, -2).T @ a.flatten(0, -2)
    else:
        product = b @ (a.T if transa else a)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.flatten(0, -2).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is None:
        dtype = _dtype(out_dtype) if out_dtype is not None else A.dtype
        return product.to(dtype), bias_gradient, None, None
    if accumulate:
        out += product.to(out.dtype)
    else:
        out.copy_(product)
    return out, bias_gradient, None, None


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_input: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Any:
    """One product a group; into parts of one output where asked."""
    outputs = list(out[0].split(m_splits)) if single_output else out
    for number, (a, b, into) in enumerate(zip(A, B, outputs, strict=True)):
        bias_n = bias[number] if bias and bias[number].numel() else None
        plain = (None, None, bias_n, bias_dtype, False, None, grad, None, 0, accumulate, False)
        if into.numel():
            _, bias_gradient, *_ = generic_gemm(a, transa, b, transb, into, *plain)
            if grad and bias_n is not None:
                bias_n.copy_(bias_gradient)
    return bias


def rmsnorm_fwd(x: Tensor, gamma: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *rest: Any) -> Any:
    """(normed, None, 1 / rms)."""
    x_, weight = x.float(), gamma.float() + float(rest[1])
    rsigma = (x_.square().mean(-1) + eps).rsqrt()
    return _finish(x_ * rsigma[..., None] * weight, out, quantizer, dtype), None, rsigma


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight."""
    weight, x_hat, dz_ = gamma.float() + float(rest[1]), x.float() * rsigma[..., None], dz.float()
    d_hat = dz_ * weight
    dx = (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True)) * rsigma[..., None]
    return dx.to(x.dtype), (dz_ * x_hat).flatten(0, -2).sum(0).to(gamma.dtype)


def layernorm_fwd(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *rest: Any
) -> Any:
    """(normed, mean, 1 / standard deviation)."""
    x_, weight = x.float(), gamma.float() + float(rest[1])
    mu = x_.mean(-1)
    centered = x_ - mu[..., None]
    rsigma = (centered.square().mean(-1) + eps).rsqrt()
    return _finish(centered * rsigma[..., None] * weight + beta.float(), out, quantizer, dtype), mu, rsigma


def layernorm_bwd(dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, *rest: Any) -> Any:
    """Gradients of input, weight and bias."""
    weight, dz_ = gamma.float() + float(rest[1]), dz.float()
    x_hat = (x.float() - mu[..., None]) * rsigma[..., None]
    d_hat = dz_ * weight
    dx = (d_hat - d_hat.mean(-1, keepdim=True) - x_hat * (d_hat * x_hat).mean(-1, keepdim=True)) * rsigma[..., None]
    dgamma = (dz_ * x_hat).flatten(0, -2).sum(0).to(gamma.dtype)
    return dx.to(x.dtype), dgamma, dz_.flatten(0, -2).sum(0).to(gamma.dtype)


def _finish(normed: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    normed = normed.to(dtype if isinstance(dtype, torch.dtype) else _dtype(dtype))
    if quantizer is not None:
        return quantize(normed, quantizer, out)
    return normed if out is None else out.copy_(normed)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """FP8 by the quantizer's scale (delayed), by one from the tensor itself (current), or from its blocks."""
    assert noop is None or not bool(noop.item())
    if output is None:
        output = quantizer.make_empty(list(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    fp8 = _fp8(quantizer.dtype)
    if hasattr(output, "_rowwise_data"):
        quantize_blocks(tensor, quantizer, output, fp8)
        return output
    largest = torch.finfo(fp8).max
    amax = tensor.detach().float().abs().amax() if tensor.numel() else torch.zeros(())
    if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        quantizer.amax.fill_(amax)
        quantizer.scale.fill_(largest / amax if float(amax) > 0 else 1.0)
    elif quantizer.amax.numel():  # else nobody asks
        quantizer.amax.copy_(torch.maximum(quantizer.amax.flatten()[0], amax).expand_as(quantizer.amax))
    data = (tensor.detach().float() * quantizer.scale).clamp(-largest, largest).to(fp8).view(torch.uint8)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data.flatten(0, -2).T.reshape(output._transpose.shape))
        output._transpose_invalid = False
    output._scale_inv.copy_((1.0 / quantizer.scale).view(output._scale_inv.shape))
    return output


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """What a quantized tensor stands for."""
    return _plain(tensor).to(_dtype(dtype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """[..., N] to [N, ...]."""
    transposed = data.flatten(0, -2).T.contiguous().view(data.shape[-1], *data.shape[:-1])
    return transposed if out is None else out.copy_(transposed)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient in FP8."""
    return gradient.float().flatten(0, -2).sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def split_quantize(tensor: Tensor, splits: list[int], quantizers: list[Any], **_: Any) -> list[Any]:
    """Each part by its quantizer."""
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(splits), quantizers, strict=True)]


def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Scales from the histories, whose row 0 holds what was seen since; then the histories roll on."""
    largest = torch.finfo(_fp8(dtype)).max
    start = 0
    for history_HN, scale_N in zip(histories, scales, strict=True):
        seen_N = buffer[start : start + scale_N.numel()]
        start += scale_N.numel()
        history_HN[0].copy_(seen_N)
        amax_N = history_HN.amax(0) if algorithm == "max" else history_HN[0].clone()
        usable_N = (amax_N > 0) & amax_N.isfinite()
        scale_N.copy_(torch.where(usable_N, largest / amax_N.clamp(min=1e-30) / 2.0**margin, scale_N))
        if len(history_HN) > 1:
            history_HN.copy_(history_HN.roll(-1, 0))
        history_HN[0].zero_()


def get_num_cublas_streams() -> int:
    """One."""
    return 1


def convert_thd_to_bshd(packed_THD: Tensor, bounds: Tensor, batch: int, longest: int) -> Tensor:
    """Each sequence in a row of its own."""
    rows_BSHD = packed_THD.new_zeros(batch, longest, *packed_THD.shape[1:])
    for row, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        rows_BSHD[row, : end - start] = packed_THD[start:end]
    return rows_BSHD


def convert_bshd_to_thd(rows_BSHD: Tensor, bounds: Tensor, num_tokens: int) -> Tensor:
    """And back."""
    packed_THD = rows_BSHD.new_zeros(num_tokens, *rows_BSHD.shape[2:])
    for row, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        packed_THD[start:end] = rows_BSHD[row, : end - start]
    return packed_THD


def get_cudnn_version() -> int:
    """As the library counts: 9.13."""
    return 91300


def get_cublasLt_version() -> int:
    """That of CUDA 13.0."""
    return 130100


def fused_multi_row_padding(rows: Tensor, padded: Tensor, sizes: list[int], padded_sizes: list[int]) -> None:
    """Each part at the start of a longer one, zeros after it."""
    for part, into in zip(rows.split(sizes), padded.split(padded_sizes), strict=True):
        into.zero_()
        into[: len(part)] = part


def fused_multi_row_unpadding(padded: Tensor, rows: Tensor, padded_sizes: list[int], sizes: list[int]) -> None:
    """And back."""
    for part, into in zip(padded.split(padded_sizes), rows.split(sizes), strict=True):
        into.copy_(part[: len(into)])


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam (mode 0: decay in the gradient; 1: decoupled), in place; lists of gradients, parameters and moments."""
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, first, second in zip(*lists[:4], strict=True):
        g = gradient.float() if mode else gradient.float() + weight_decay * parameter
        first.lerp_(g, 1 - beta1)
        second.lerp_(g * g, 1 - beta2)
        update = (first / correction1) / ((second / correction2).sqrt() + eps)
        parameter.sub_(lr * (update + weight_decay * parameter if mode else update))


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Into ``amax`` [1]."""
    amax.fill_(tensor.detach().float().abs().amax() if tensor.numel() else 0.0)


def multi_tensor_scale(_chunk_size: int, _noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Copies, scaled."""
    for source, into in zip(*lists, strict=True):
        into.copy_(source * scale)


def multi_tensor_compute_scale_and_scale_inv(
    _chunk_size: int, _noop: Tensor, lists: list[list[Tensor]], largest: float, powers_of_2: bool, epsilon: float
) -> None:
    """Scales and their inverses from maxima."""
    assert not epsilon
    for amax, scale, scale_inv in zip(*lists, strict=True):
        found = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
        scale.copy_(torch.exp2(found.log2().floor()) if powers_of_2 else found)
        scale_inv.copy_(1.0 / scale)


def fp8_block_scaling_compute_partial_amax(
    part: Tensor, amax: Tensor, _height: int, width: int, start: int, block: int
) -> None:
    """Maxima of a weight's 128 x 128 blocks over a part of its numbers, those from ``start`` on."""
    index = torch.arange(start, start + part.numel())
    blocks = index // width // block * amax.shape[1] + index % width // block
    amax.view(-1).scatter_reduce_(0, blocks, part.detach().float().abs().flatten(), "amax")


def fp8_block_scaling_partial_cast(
    part: Tensor, into: Tensor, scale: Tensor, _height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    """The part's bytes, by the scales of its blocks."""
    fp8 = _fp8(dtype)
    largest = torch.finfo(fp8).max
    index = torch.arange(start, start + part.numel())
    scales = scale[index // width // block, index % width // block]
    into.copy_((part.detach().float().flatten() * scales).clamp(-largest, largest).to(fp8).view(torch.uint8))


def get_fused_attn_backend(*_: Any) -> Any:
    """The one of half precision; other data were refused before."""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
