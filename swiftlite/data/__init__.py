"""Datasets: files and hub ids -> rows -> conversations -> encoded samples -> packed batches."""

from __future__ import annotations

from swiftlite.data.encoding import Report
from swiftlite.data.loading import load, load_training
from swiftlite.data.rows import BadRow, Row, Rows
from swiftlite.data.store import Sample

__all__ = ["BadRow", "Report", "Row", "Rows", "Sample", "load", "load_training"]
