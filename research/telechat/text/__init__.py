"""A conversation as token ids: vocabularies, templates, the renderer."""
