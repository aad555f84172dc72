"""The folder for `PYTHONPATH` of a vLLM server; nothing in it imports this package."""
