"""Editors: change the weights that hold a memory. They write and never decide where.

```python
import editors

edit = editors.EDITORS["sparse-fine-tune"]()(view, editors.Request(forget=secrets, selection=where.top(fraction=0.1)))
with edit.apply(view):  # undone to the bit when the block ends
    ...
```

Each name is imported when it is first used. Everything else is imported from the file that holds it.
"""

from typing import TYPE_CHECKING

from memloc.lazy import offer

if TYPE_CHECKING:
    from editors.base import Editor, Request
    from editors.control import random_like
    from editors.edit import Edit
    from editors.methods import EDITORS
    from editors.shipping.checkpoint import apply_edit, undo_edit

_OFFERED = {
    "EDITORS": "editors.methods:EDITORS",
    "Edit": "editors.edit:Edit",
    "Editor": "editors.base:Editor",
    "Request": "editors.base:Request",
    "apply_edit": "editors.shipping.checkpoint:apply_edit",
    "random_like": "editors.control:random_like",
    "undo_edit": "editors.shipping.checkpoint:undo_edit",
}

__all__ = ["EDITORS", "Edit", "Editor", "Request", "apply_edit", "random_like", "undo_edit"]

if not TYPE_CHECKING:  # a type checker that saw `__getattr__` would believe in every name
    __getattr__, __dir__ = offer("editors", _OFFERED)
