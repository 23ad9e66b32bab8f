"""vlmfast: the fast core under vision-language pretraining. Importing it costs torch only."""

from importlib import import_module

from vlmfast import ops
from vlmfast.ops import _dispatch

__version__ = "0.1.0"
__all__ = ["explain", "ops"]


def explain(op: str, *args: object) -> dict[str, str | None]:
    """Why each backend of an op would not run on these arguments, in order of preference.

    Args:
        op: name of an op in vlmfast.ops, such as "info_nce".
        *args: the op's arguments, as its public function takes them.
    Returns:
        Backend name to reason; None marks one that can run. The first such one is used. With VLMFAST_BACKEND set, only
        the backend that it names is listed.
    Raises:
        ValueError: there is no op of that name.
    """
    if op not in ops.__all__:
        raise ValueError(f"explain: op must be one of {', '.join(ops.__all__)}; got {op!r}")
    return _dispatch.explain(op, import_module(f"vlmfast.ops.{op}").IMPLS, *args)
