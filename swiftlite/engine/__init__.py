"""The shared paged-attention engine: one step loop that serves a base model and any number of LoRA adapters.

Read in this order: request (what is asked), scheduler and blocks (who runs), runner and bridge (how it runs), engine (the loop).
It never imports `train`, `server` or `commands`.
"""
