"""vlmfast: the fast core under vision-language pretraining. Importing it costs torch only."""

import sys

from vlmfast import ops
from vlmfast.integrations import PatchReport, patch, unpatch
from vlmfast.ops import _dispatch

__version__ = "0.1.0"
__all__ = ["PatchReport", "explain", "ops", "patch", "unpatch"]


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
