"""Offline compression of models: calibration, search, export, proof of quality. No import of torch here: the CLI lists it."""
