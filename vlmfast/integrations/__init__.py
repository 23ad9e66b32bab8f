"""vlmfast's modules and losses put into models of other libraries, and taken out again."""

from vlmfast.integrations.patch import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
