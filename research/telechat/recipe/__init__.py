"""What a recipe says: its keys, their defaults, the options that change it, and keys of earlier recipes."""
