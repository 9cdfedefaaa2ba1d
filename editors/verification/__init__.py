"""The right to say “gone”: what an edit took out, whether it is really out, and what else broke.

`verify(view, edit, data)` asks an edited model in every way that has been seen to bring back what an edit only hid,
each beside texts never seen and beside the model before the edit, and measures what the edit cost.
"""

from editors.verification.material import Budget, Effort, Material
from editors.verification.run import verify
from editors.verification.verification import Verification

__all__ = ["Budget", "Effort", "Material", "Verification", "verify"]
