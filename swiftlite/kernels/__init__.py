"""C++ for CPUs: the sources, how they are built on a machine's first use (build.py), and the small steps' functions (steps.py).

Used by the engine, and by training where a step has a gradient. Imports neither.
"""
