from __future__ import annotations

import pytest
import torch
from media import any_media, last_media, qkv, with_weights
from numerics import loss_and_gradients

from vlmfast.ops import media_attention
from vlmfast.ops._dispatch import core

pytestmark = pytest.mark.skipif(core is None, reason="the C++ extension was not built")


def test_the_number_of_threads_changes_nothing() -> None:
    inputs = [t.float() for t in (*qkv(2, 4, 2, 200, 5 * 50, 32), torch.randn(2, 4, 200, 32))]
    options = any_media(2, 200, 5) | {"tokens_per_media": 50}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(with_weights(media_attention, **options), inputs)[1:])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_does_not_grow_with_the_media_not_seen(run_python) -> None:
    """L = 4096, 64 media of 64 tokens, 8 heads: 45 MB beyond the inputs, where the scores alone take 537 MB."""
    peak = run_python(
        """
        import torch
        from vlmfast.ops import media_attention
        def memory(field):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
        q, k, v = (torch.randn(1, 8, 4096, 64).requires_grad_() for _ in range(3))
        seen = torch.arange(1, 65).repeat_interleave(64)[None]
        options = {"tokens_per_media": 64, "media_lo": seen, "media_hi": seen}
        few = {"tokens_per_media": 64, "media_lo": seen[:, :64], "media_hi": seen[:, :64]}
        media_attention(q[:, :, :64], k, v, **few).sum().backward()
        q.grad = k.grad = v.grad = None
        before = memory("VmRSS")
        media_attention(q, k, v, **options).sum().backward()
        print(memory("VmHWM") - before)
        """
    )
    assert float(peak) < 80  # out, dq, dk, dv and the gradient of out take 8 MB each, twice where autograd copies


def test_time_does_not_grow_with_the_media_not_seen() -> None:
    """Processor time of the calling thread: rows that see one medium of 64 take a small part of what all take."""
    import time

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, v = (t.float() for t in qkv(1, 4, 4, 512, 64 * 64, 64))
        one = last_media(1, 512, 64)
        every = {"media_lo": torch.ones(1, 512), "media_hi": torch.full((1, 512), 64)}

        def seconds(intervals: dict[str, torch.Tensor]) -> float:
            times = []
            for _ in range(4):
                start = time.process_time()
                media_attention(q, k, v, tokens_per_media=64, **{name: t.int() for name, t in intervals.items()})
                times.append(time.process_time() - start)
            return min(times)

        assert seconds(one) < seconds(every) / 4
    finally:
        torch.set_num_threads(threads)
