"""C++ for CPUs: the sources, how they are built on a machine's first use (build.py), and the functions
of the small steps (steps.py), with their gradients (gradients.py).

Used by the engine, and by training where a step has a gradient. Imports neither.
"""
