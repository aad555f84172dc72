"""Align language models with human feedback, as PyTorch Lightning modules."""
