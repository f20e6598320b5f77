"""Measurements of an engine and of the machine it runs on. It knows no text and no flags."""
