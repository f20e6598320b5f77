"""HTTP over the asynchronous engine: the extra `serve`. Nothing below it imports it."""
