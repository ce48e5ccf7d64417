"""The command lines of the plugin."""
