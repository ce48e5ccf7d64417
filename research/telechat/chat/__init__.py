"""Holding a conversation: history, terminal, interruption."""
