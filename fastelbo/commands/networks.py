"""The name under which pickles of earlier versions know `fastelbo.nets`."""

from fastelbo.nets import LearnedDispersion as LearnedDispersion
from fastelbo.nets import LearnedScale as LearnedScale
from fastelbo.nets import Log1p as Log1p
