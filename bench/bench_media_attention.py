"""`vlmfast bench media_attention` as a script, and its rows under pytest-benchmark."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from vlmfast.bench.harness import NotHere
from vlmfast.bench.media_attention import CASES, PROVIDERS, error, exact_results, gflop, make_inputs, step
from vlmfast.bench.timing import here
from vlmfast.cli.bench import run


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", list(PROVIDERS))
def test_media_attention(benchmark, name: str, case: str) -> None:
    device = here()
    provider, scope = PROVIDERS[name], CASES[case].scope
    torch.compiler.reset()
    try:
        function = provider.function(CASES[case], device)
    except NotHere as reason:
        pytest.skip(str(reason))
    inputs = make_inputs(CASES[case], torch.float32, device)

    def once() -> list[Tensor]:
        results = step(function, inputs, scope, provider.backend)
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    results = benchmark.pedantic(once, rounds=5, warmup_rounds=2)
    benchmark.extra_info.update(provider=name, case=case, gflop=gflop(CASES[case], inputs))
    if name != "projections alone":
        benchmark.extra_info["error"] = error(results, exact_results(CASES[case], torch.float32, device))


if __name__ == "__main__":
    raise SystemExit(run(["media_attention", *sys.argv[1:]]))
