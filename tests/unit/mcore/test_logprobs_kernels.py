"""The Triton kernels compile to machine code of the GPUs this is for; no GPU is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels are Triton's")

OWN = {
    "statistics_kernel": {"sums": "*fp32", "picked": "*fp32"},
    "gradient_kernel": {"log_sums": "*fp32", "grads": "*fp32", "num_columns": "i32"},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OWN)
def test_kernel_compiles_for_hopper(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_groupdpo.mcore.passes import logprobs_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(logprobs_kernels, name)
    common = {"logits": f"*{dtype}", "columns": "*i64", "peaks": "*fp32", "stride": "i32", "num_real": "i32"}
    known = common | OWN[name] | {"BLOCK": "constexpr", "NUM_REAL": "constexpr"}
    signature = {argument: known[argument] for argument in kernel.arg_names}
    constants = {"BLOCK": logprobs_kernels.BLOCK_COLUMNS, "NUM_REAL": 50257}
    used = {argument: value for argument, value in constants.items() if argument in signature}
    source = ASTSource(kernel, signature, used)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
