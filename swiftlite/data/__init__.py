"""Datasets: files and hub ids -> rows -> conversations -> encoded samples -> packed batches."""
