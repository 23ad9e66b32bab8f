"""A pytest plugin: PyTorch as vlmfast would find it were its undocumented names gone.

vlmfast sees no name of a module of torch that begins with an underscore; everybody else does.
"""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import torch  # noqa: F401 - its modules are changed below

_import = builtins.__import__


def asked_by_vlmfast() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("vlmfast")


def hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class WithoutPrivateNames(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        if hidden(name) and asked_by_vlmfast():
            raise AttributeError(f"{ModuleType.__getattribute__(self, '__name__')}.{name} is hidden")
        return ModuleType.__getattribute__(self, name)


def import_public(name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    by_vlmfast = (globals_ or {}).get("__name__", "").startswith("vlmfast")
    by_statement = not isinstance(fromlist, list)  # torch's C++ imports what it needs in the name of the calling frame
    if by_vlmfast and by_statement and name.split(".")[0] == "torch":
        for part in (*name.split("."), *(fromlist or ())):
            if hidden(part):
                raise ImportError(f"{part} of {name} is hidden")
    return _import(name, globals_, locals_, fromlist, level)


assert "vlmfast" not in sys.modules
builtins.__import__ = import_public
for found in [module for name, module in sys.modules.items() if name.split(".")[0] == "torch"]:
    if type(found) is ModuleType:
        found.__class__ = WithoutPrivateNames
