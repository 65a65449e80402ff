"""Installed as the package `swift`: SWIFT's import name, a thin face of swiftlite (it cannot live beside ms-swift)."""

from swiftlite import __getattr__, __version__  # noqa: F401
