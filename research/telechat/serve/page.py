"""The chat page, page.html next to this file, and its Content-Security-Policy."""
import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Tuple

PAGE = Path(__file__).with_name("page.html")


@lru_cache(maxsize=1)
def read_page() -> Tuple[bytes, str]:
    """(the page, its Content-Security-Policy). The page loads no external resources, connects only to its own server,
    and uses only its inline script and style, which the policy allows by hash."""
    page = PAGE.read_bytes()

    def hashes(tag: str) -> str:
        found = re.findall(rb"<" + tag.encode() + rb">(.*?)</" + tag.encode() + rb">", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
    policy = (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return page, policy
