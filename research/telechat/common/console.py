"""What MindFormers prints while a chat or a server starts, none of which its user can act on."""
import logging
import os

OWN = "telechat"


class _FilesOnly(logging.Filter):
    """Warnings of MindFormers itself go to its log files, and not to the console. Errors, and the warnings of this
    plugin, pass."""

    def __init__(self, logger: logging.Logger):
        super().__init__()
        self._logger = logger

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether all handlers get the record; if not, those of files have it already."""
        if record.levelno >= logging.ERROR or OWN in record.pathname.replace("\\", "/").split("/")[-3:]:
            return True
        for handler in self._logger.handlers:
            if isinstance(handler, logging.FileHandler) and record.levelno >= handler.level:
                handler.handle(record)
        return False


def only_own_warnings() -> None:
    """Call before MindFormers is imported and behind `prepare_log` (common/files.py): its logger is named after the
    folder that is set there."""
    logger = logging.getLogger(f"mindformers{os.environ.get('LOG_MF_PATH', '')}")
    logger.addFilter(_FilesOnly(logger))
