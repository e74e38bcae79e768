"""Runtimes: one file a backend, behind the Protocol in `base.py`."""
