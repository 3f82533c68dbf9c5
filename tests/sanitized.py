"""pytest -p sanitized: for a library that is built with sanitizers (scripts/sanitize.sh).

gcc vectorizes no loop that it instruments. A sum then has one lane and more rounding errors, which are judged with a
higher floor: values are what the other builds are tested for.
"""

import oracle

oracle.FLOOR *= 16
