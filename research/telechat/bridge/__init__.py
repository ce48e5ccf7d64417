"""What MindFormers asks of a plugin, and how its versions differ."""
