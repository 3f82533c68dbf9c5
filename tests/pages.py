"""The Python code of a page."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def code_of(text: str) -> list[str]:
    """The blocks of Python in a text of Markdown."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
