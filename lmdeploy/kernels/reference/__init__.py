"""Plain PyTorch twins of every kernel: the oracle of the tests, and what runs where nothing faster does."""
