"""Chat from Python, by the name that users of the family know. The code is in chat/api.py."""
from research.telechat.chat.api import *  # noqa: F403
from research.telechat.chat.api import __all__  # noqa: F401
