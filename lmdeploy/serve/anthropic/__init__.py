"""Anthropic's Messages interface over the same chat as OpenAI's."""
