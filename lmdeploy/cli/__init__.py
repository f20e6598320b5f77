"""The command line: one module per command. It knows no tensor and no text format."""
