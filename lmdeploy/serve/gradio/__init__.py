"""The chat page made with gradio: the extra `gradio`. It is one more client of the engine, or of a server."""
