"""`swift.llm` is `swiftlite.llm`, the same module object."""

import sys

import swiftlite.llm

sys.modules[__name__] = swiftlite.llm
