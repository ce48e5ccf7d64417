"""How --help shows the defaults of options."""
import argparse
from typing import Optional


class HelpFormatter(argparse.HelpFormatter):
    """Appends the default to an option's help if it is a number or text and the help does not state it."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        text, default = action.help or "", action.default
        shown = isinstance(default, (int, float, str)) and not isinstance(default, bool) and default not in (
            "", argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown and text and "default" not in text else action.help
