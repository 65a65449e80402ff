"""C++ for CPUs: the sources, how they are built on a machine's first use (build.py), and the functions
of the small steps (steps.py), with their gradients (gradients.py), of a frozen weight's product with its adapter (lowrank.py), and of
attention within documents (segments.py).

Used by the engine, and by training where a step has a gradient. Imports neither.
"""
