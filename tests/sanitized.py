"""pytest -p sanitized: for a library that is built with sanitizers (scripts/sanitize.sh).

gcc vectorizes no loop that it instruments. A sum then has one lane and more rounding errors, which are judged with a
higher floor: values are what the other builds are tested for.
"""

from pathlib import Path

import oracle

import fastelbo

assert Path(fastelbo.__file__).parent.parent.name == "address", f"{fastelbo.__file__} is not the sanitized library"
oracle.FLOOR *= 16
