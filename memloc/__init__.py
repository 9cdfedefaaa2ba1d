"""memloc: find where a language model keeps what it has memorized. It looks and never writes a weight.

```python
import memloc

view = memloc.ModelView.open("my-model")
secrets = memloc.Passages.read("secrets.jsonl", view.tokenizer)
where = memloc.LOCALIZERS["integrated-gradients"]()(view, secrets)
best = where.top(50)
```

The names below are the ones most scripts need; each is imported when it is first used, so `import memloc` costs
milliseconds and no torch. Everything else is imported from the file that holds it.
"""

from typing import TYPE_CHECKING

from memloc.lazy import offer

if TYPE_CHECKING:
    from memloc.errors import MemlocError
    from memloc.measurement import Measurement
    from memloc.methods import LOCALIZERS, MEASURES
    from memloc.passages import Facts, Passages
    from memloc.report import Report
    from memloc.scores import Localization, Selection
    from memloc.sites import Grain, Kind, Site
    from memloc.view import ModelView

_OFFERED = {
    "Facts": "memloc.passages:Facts",
    "Grain": "memloc.sites:Grain",
    "Kind": "memloc.sites:Kind",
    "LOCALIZERS": "memloc.methods:LOCALIZERS",
    "Localization": "memloc.scores:Localization",
    "MEASURES": "memloc.methods:MEASURES",
    "Measurement": "memloc.measurement:Measurement",
    "MemlocError": "memloc.errors:MemlocError",
    "ModelView": "memloc.view:ModelView",
    "Passages": "memloc.passages:Passages",
    "Report": "memloc.report:Report",
    "Selection": "memloc.scores:Selection",
    "Site": "memloc.sites:Site",
}

__all__ = [
    "LOCALIZERS", "MEASURES", "Facts", "Grain", "Kind", "Localization", "Measurement", "MemlocError", "ModelView",
    "Passages", "Report", "Selection", "Site",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker that saw `__getattr__` would believe in every name
    __getattr__, __dir__ = offer("memloc", _OFFERED)
