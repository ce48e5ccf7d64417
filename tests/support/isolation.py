"""Whether this machine lets programs be isolated, which a container may forbid."""
from needs import require

from research.telechat.common.errors import ConfigError
from research.telechat.evaluation.sandbox import check_isolation


def require_isolation():
    """Skip the test where the isolation cannot be set up, or fail with CI=true. One that does not hold is an error."""
    try:
        check_isolation()
    except ConfigError as err:
        if "cannot be set up" not in str(err):
            raise
        require(False, str(err))
