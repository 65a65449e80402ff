"""The shared paged-attention engine: one step loop that serves a base model and any number of LoRA adapters.

Read in this order: request (what is asked), sequence (its state), scheduler and blocks (who runs), runner and bridge (how it
runs), loop and step (one step after another), engine and stream (the face).
It never imports `train`, `server` or `commands`.
"""
