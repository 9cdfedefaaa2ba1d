"""MQuAKE's figures: are multi-hop questions answered as the edited facts imply?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.asking import at_least_one, mean_share, need_some, predicted, written
from memloc.measures.prose import names
from memloc.passages import Fact, Facts
from memloc.provenance import Provenance, digest_bytes, digest_json, settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Mquake:
    """A case counts when the model's own text answers any of its multi-hop questions with the new answer or an alias.

    "multi-hop": the share of such cases. "multi-hop each": of all questions. "multi-hop old": cases answered with the
    answer before the edit, the right one on the unedited model. "edit-wise": edited facts whose new answer is the
    arg-max, every token, after its prompt. "instance-wise": cases in which every single hop of the new chain is
    answered. Text is greedy and read up to its first line break; an answer counts where it stands as whole words.

    The facts of one case share its questions: edit them together, and measure all of them.

    Rows: one a case.

    Attributes:
        template: how a question is put, {} standing for it.
        shots: a text file put in front of every question: the papers' few-shot or chain-of-thought prompts, which the
            benchmark supplies. Without, a base model is asked cold, and its figures are no paper's.
        tokens: written by the model.
        batch_size: rows of a forward pass.

    Cost: a forward over each question with its shots and a step a token written.

    Source: Zhong et al. 2023, arXiv:2305.14795.
    """

    template: str = "Q: {}\nA:"
    shots: str | None = None
    tokens: int = 20
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least_one("mquake", tokens=self.tokens, batch_size=self.batch_size)
        if self.template.count("{}") != 1:
            raise InputError(f"mquake: template {self.template!r}: expected one {{}} for the question")

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure the cases of `facts` on the model.

        Raises:
            InputError: facts that are not of MQuAKE, no tokenizer, a question that does not fit the context.
            ModelError: logits that are not finite.
        """
        need_some(facts)
        cases = _cases(facts)
        ahead = self._shots()
        pairs = [(fact.prompt.ids, fact.target) for fact in facts]
        exact = dict(zip(facts.ids, predicted(view, pairs, batch_size=self.batch_size), strict=True))
        asked = list(dict.fromkeys(question for case in cases.values() for question in _questions(case[0])))
        prompts = [ahead + self.template.replace("{}", question) for question in asked]
        texts = written(view, prompts, self.tokens, batch_size=self.batch_size)
        said = {question: text.strip().split("\n")[0] for question, text in zip(asked, texts, strict=True)}
        rows = tuple({"id": name, **_judged(case, said, exact)} for name, case in cases.items())
        figures: dict[str, Figure] = {}
        for name in ("multi-hop", "multi-hop each", "edit-wise", "instance-wise"):
            figures |= mean_share(name, rows)
        figures |= mean_share("multi-hop old", rows, better="")
        inputs = {
            "model": view.digest, "facts": facts.digest,
            "prompts": digest_json([prompts, [case[0].tags["new_answer"] for case in cases.values()]]),
        }  # fmt: skip
        settings = {**settings_of(self), "shots": None if self.shots is None else digest_bytes(ahead.encode())}
        return Measurement("mquake", figures, rows, Provenance("mquake", settings, None, inputs))

    def _shots(self) -> str:
        if self.shots is None:
            return ""
        try:
            return Path(self.shots).read_text(encoding="utf8").rstrip() + "\n\n"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.shots}: the shots cannot be read ({error})") from error


def _cases(facts: Facts) -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        if not isinstance(fact.tags.get("questions"), list) or not isinstance(fact.tags.get("new_answer"), str):
            raise InputError(
                f"fact {fact.id!r} carries no multi-hop 'questions' and 'new_answer'; mquake needs its records"
            )
        found.setdefault(str(fact.tags.get("case", fact.id)), []).append(fact)
    return found


def _questions(fact: Fact) -> list[str]:
    hops = [str(hop["question"]) for hop in _hops(fact)]
    return [*map(str, fact.tags["questions"]), *hops]


def _hops(fact: Fact) -> list[Mapping[str, Any]]:
    hops = fact.tags.get("new_single_hops")
    return [hop for hop in hops or () if isinstance(hop, Mapping) and hop.get("question")]


def _answers(tags: Mapping[str, Any], key: str) -> list[str]:
    aliases = tags.get(f"{key}_alias")
    return [str(entry) for entry in [tags.get(key), *(aliases if isinstance(aliases, list) else [])] if entry]


def _judged(case: Sequence[Fact], said: Mapping[str, str], exact: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    tags = case[0].tags
    replies = [said[str(question)] for question in tags["questions"]]
    new = [names(reply, _answers(tags, "new_answer")) for reply in replies]
    old = [names(reply, _answers(tags, "answer")) for reply in replies]
    hops = [names(said[str(hop["question"])], _answers(hop, "answer")) for hop in _hops(case[0])]
    edited = [exact[fact.id] == fact.target for fact in case]
    return {
        "multi-hop": any(new),
        "multi-hop each": sum(new) / len(new),
        "multi-hop old": any(old),
        "edit-wise": sum(edited) / len(edited),
        **({"instance-wise": all(hops)} if hops else {}),
        "replies": replies,
    }
