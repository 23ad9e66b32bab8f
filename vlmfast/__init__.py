"""vlmfast: the fast core under vision-language pretraining. Importing it costs torch only."""

import sys

from vlmfast import ops
from vlmfast.integrations import PatchReport, patch, unpatch
from vlmfast.ops import _dispatch

__version__ = "0.1.0"
__all__ = ["PatchReport", "explain", "ops", "patch", "release_memory", "unpatch"]


def explain(op: str, *args: object) -> dict[str, str | None]:
    """Why each backend of an op would not run on these arguments, in order of preference.

    Args:
        op: name of an op in vlmfast.ops that has backends, such as "info_nce".
        *args: the op's arguments, as its public function takes them.
    Returns:
        Backend name to reason; None marks one that can run. The first such one is used. With VLMFAST_BACKEND set, only
        the backend that it names is listed.
    Raises:
        ValueError: there is no op of that name.
    """
    found = {name: getattr(sys.modules.get(f"vlmfast.ops.{name}"), "IMPLS", None) for name in ops.__all__}
    impls = {name: backends for name, backends in found.items() if backends}
    if op not in impls:
        raise ValueError(f"explain: op must be one of {', '.join(impls)}; got {op!r}")
    return _dispatch.explain(op, impls[op], *args)


def release_memory() -> int:
    """Frees the memory that the C++ backend holds on a CPU from call to call, and returns how many bytes.

    A training loop needs the same memory in each step; fresh memory costs up to a quarter of an op's time. Held are, of
    the last calls,

    - info_nce: the (n, N) float32 exponentials, unless recomputed; both gradients in float32; and features in other
      layouts: one copy of text for float32, up to five of the features of a side for 16 bits;
    - sigmoid_loss and linear_cross_entropy: from the same buffers, gradients and features; the latter also its kept
      logits;
    - patch_embed: the tokens of the last two calls, and weight's gradient in float32, once for each of up to 8 threads.

    A buffer of more than 1 GB is never held. What a tensor still uses is let go of, and freed with the tensor. The next
    call of an op takes fresh memory. Backends for GPUs hold nothing: torch.cuda.empty_cache() frees what PyTorch holds.
    """
    freed: int = _dispatch.core.release_memory() if _dispatch.core else 0
    return freed
