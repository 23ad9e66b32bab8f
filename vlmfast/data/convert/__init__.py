"""Public data sets, as they are published, to tar shards of images and records; docs/convert.md has the formats."""

from vlmfast.data.convert.formats import FORMATS, Format
from vlmfast.data.convert.items import Item
from vlmfast.data.convert.shards import Converted, convert

__all__ = ["FORMATS", "Converted", "Format", "Item", "convert"]
