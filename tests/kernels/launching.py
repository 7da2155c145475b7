"""Makes every launch as a GPU would see it, up to the launch itself: arguments are specialised and compiled.

``python -m tests.kernels.launching`` stands in for the driver of an H100, calls each kernel's host function on CPU
tensors, and prints the names of what was compiled. What the outputs hold is nobody's business here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from tests.kernels.deltas import Request, Setting, case, normal

SETTING = Setting("cpu", torch.bfloat16, 0.0)
REQUESTS = (Request(40, 4), Request(30, 20, True), Request(10))


def stand_in() -> list[tuple[str, dict[str, Any]]]:
    """Replaces the driver, and every launch by its compilation; returns the growing list of (kernel, constants)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Absent())
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        constants = {k: v for k, v in kwargs.items() if isinstance(v, (int, float, str))}
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        compiled.append((self.__name__, constants))
        return kernel

    JITFunction.run = compile_only
    return compiled


def launches() -> None:
    """Calls every host function once or twice."""
    from bertology_serve.kernels import autograd, bottleneck, layernorm, shrink_expand
    from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
    from bertology_serve.kernels.tuning import Config

    small = Config(64, 32, 64, 32, 1, 4, 3, True)
    it = case([REQUESTS], 128, 64).cast(SETTING)
    it = replace(it, x=it.x.contiguous())
    columns = it.columns(64)
    fused_lora_linear(it.x, it.w, it.bias, it.pools, columns, "gelu", small)
    fused_lora_linear(it.x, it.w, None, config=replace(small, tma=False))
    three = case([REQUESTS] * 3, 128, 3 * 32).cast(SETTING)
    fused_lora_linear(three.x, three.w, three.bias, three.pools, three.columns(64), config=small)
    s = shrink_expand.segmented_lora_shrink(it.x, it.pools, columns, small, pdl=True)
    shrink_expand.linear_lora_epilogue(it.x, it.w, it.bias, it.pools, columns, s, "", small, pdl=True)
    shrink_expand.lora_expand(torch.zeros(80, 64, dtype=s.dtype), s, it.pools, columns, small)
    leaves = [p.requires_grad_() for pool in it.pools for p in pool if p is not None]
    x = it.x.detach().requires_grad_()
    y = autograd.differentiable_lora_linear(x, it.w, it.bias, it.pools, columns, small)
    torch.autograd.grad(y.sum(), [x, *leaves])
    square = case([REQUESTS], 128, 128).cast(SETTING)
    [(down, up)] = square.pools
    assert down is not None
    shift = SETTING.put(normal(down.shape[0], 1, seed=1))
    bottleneck.grouped_bottleneck_adapter(square.x, square.x, down, shift, up, square.columns(64), "gelu")
    layernorm.layer_norm(square.x, square.bias, square.bias, 1e-12, square.x, up, square.columns(4))


def main() -> None:
    """Prints the compiled kernels as one line of JSON."""
    compiled = stand_in()
    launches()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
