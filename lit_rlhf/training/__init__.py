"""Machinery of the training loop: checks, resume, distributed reductions, logging, timing, optimization."""
