"""The tests mirror the package; `python -m tests.NAME` runs the tools among them."""
