"""HTTP server: the APIs, detokenisation, limits, metrics, the chat page."""
