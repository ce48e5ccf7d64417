"""Answering over HTTP: the APIs, text out of tokens, limits, metrics, the chat page."""
