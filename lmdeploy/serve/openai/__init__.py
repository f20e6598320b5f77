"""The OpenAI-compatible server and LMDeploy's own endpoints beside it."""
