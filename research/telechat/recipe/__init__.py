"""What a recipe says: its keys, their defaults, and those of earlier recipes."""
