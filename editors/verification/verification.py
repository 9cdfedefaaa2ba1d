"""What a verification says, as one value: every finding, what was not tested, what else broke, and the worst of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.verification.collateral import HARMS, Damage, Harm
from editors.verification.judging import ORDER, Finding, Word
from memloc.provenance import Provenance
from memloc.report import Comparison
from memloc.store import write_text

SCHEMA = "memloc.verification/1"

NEVER_TESTED = (
    "longer relearning, and with other settings, than was tried here",
    "prompts in other languages, in a dialogue, or by people who know the text",
    "probes trained on the model's inner states",
    "copies and near copies of the targets that stood in the training text",
    "other targets than these",
)
"""What no run of this battery covers, said on every page."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """An edit, verified.

    Attributes:
        model: name of the model.
        findings: one a check.
        untested: title of a check to why it was not made.
        comparisons: every group before, after and under the random edit of equal size.
        damages: a verdict on everything that should stay.
        moved: bits to the share of edited weights that lie in another bucket at that precision.
        edit: the edit's own summary.
        provenance: effort, seed, and digests of model, edit and data.
    """

    model: str
    findings: tuple[Finding, ...]
    untested: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    damages: tuple[Damage, ...]
    moved: Mapping[int, float]
    edit: Mapping[str, Any]
    provenance: Provenance

    @property
    def verdict(self) -> Word:
        """The worst alarm of any check; without one, "gone" where the plain question and most checks say so."""
        words = [finding.verdict for finding in self.findings]
        alarms = [word for word in words if word not in ("gone", "cannot tell")]
        if alarms:
            return max(alarms, key=ORDER.index)
        plainly = all(finding.verdict == "gone" for finding in self.findings if finding.check == "as-given")
        return "gone" if plainly and 2 * words.count("gone") > len(words) else "cannot tell"

    @property
    def harm(self) -> Harm:
        """The worst that became of anything that should stay."""
        words = {damage.verdict for damage in self.damages}
        return max(words, key=HARMS.index) if words else "cannot tell"

    def __getitem__(self, check: str) -> Finding:
        return next(finding for finding in self.findings if finding.check == check)

    @property
    def sentence(self) -> str:
        """The result in three sentences or fewer, with no more said than was tested."""
        hurt = [damage.group for damage in self.damages if damage.verdict in ("damaged", "broken")]
        kept = "Nothing measured that should stay was damaged." if self.damages else "Nothing else was measured."
        if hurt:
            kept = f"{'Broken' if self.harm == 'broken' else 'Damaged'}: {', '.join(hurt)}."
        return f"{self._memory()} {kept}"

    def _memory(self) -> str:
        """What became of the targets, in one sentence."""
        made, alarms = len(self.findings), [f for f in self.findings if f.verdict in ("hidden", "not removed")]
        blind = sum(finding.verdict == "cannot tell" for finding in self.findings)
        if self.verdict == "gone":
            rest = f" ({blind} of them cannot tell)" if blind else ""
            return f"None of {made} checks found a trace of the targets: gone, as far as these checks can see{rest}."
        if self.verdict == "cannot tell":
            return f"{blind} of {made} checks cannot tell whether the targets are gone; none found a trace."
        if self.verdict == "over-forgotten":
            return ("The targets are less likely than texts never seen: over-forgotten, which itself gives away that "
                    "something was taken out.")  # fmt: skip
        if self.verdict == "not removed":
            return (f"Not removed: the plain question finds the targets still there; in all, {len(alarms)} of {made} "
                    "checks do.")  # fmt: skip
        whole = sum(bool(f.recited and f.recited[0]) and not f.taught for f in alarms)
        worst = ", ".join(finding.title.lower() for finding in sorted(alarms, key=_severity)[:3])
        said = f"{whole} of them bring" if whole > 1 else f"{'one' if whole else 'none'} of them brings"
        return (f"Hidden, not gone: {len(alarms)} of {made} checks find the targets still there (most in: {worst}); "
                f"{said} one out word for word without teaching it.")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As strict JSON values."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "verdict": self.verdict,
            "harm": self.harm,
            "sentence": self.sentence,
            "checks": [finding.to_json() for finding in self.findings],
            "untested": dict(self.untested),
            "never tested": list(NEVER_TESTED),
            "damages": [_plain(damage.to_json()) for damage in self.damages],
            "moved buckets": _plain({str(bits): share for bits, share in self.moved.items()}),
            "comparisons": [entry.to_json() for entry in self.comparisons],
            "provenance": self.provenance.to_json(),
        }

    def save(self, folder: str | Path, *, commands: tuple[str, ...] = ()) -> list[Path]:
        """Write `report.html`, `report.md`, `report.json` and `verification.json` into a folder.

        Raises:
            TargetError: it cannot be written.
        """
        from editors.verification.page import page

        written = list(page(self, commands).save(folder))
        path = Path(folder) / "verification.json"
        write_text(path, json.dumps(_plain(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return [*written, path]


def _severity(finding: Finding) -> tuple[int, float]:
    share = finding.left.value
    return -ORDER.index(finding.verdict), -(share if math.isfinite(share) else 0.0)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
