"""The table of checks: what each is called, what it tries, which probe answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from editors.verification import heard_otherwise, prefixes, prompting, quantised, relearning
from editors.verification.material import Effort, Material
from editors.verification.scores import Scores
from memloc.view import ModelView

Probe = Callable[[ModelView, Material, Effort, int], dict[str, Scores]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: short, as files and programs call it.
        title: as the page calls it.
        tried: one sentence for a reader who knows no jargon.
        direct: it asks plainly; see `judging.judged`.
        taught: it teaches the texts themselves.
    """

    name: str
    title: str
    tried: str
    direct: bool = False
    taught: bool = False


@dataclass(frozen=True)
class Attempt:
    """A probe and the checks it answers in one go.

    Attributes:
        name: of the file its scores are kept in.
        checks: one for each entry of what the probe returns, by name.
        probe: asks one state of the model.
    """

    name: str
    checks: tuple[Check, ...]
    probe: Probe


def _alone(name: str, ask: Callable[[ModelView, Material, Effort, int], Scores]) -> Probe:
    return lambda view, data, effort, seed: {name: ask(view, data, effort, seed)}


def attempts() -> tuple[Attempt, ...]:
    """Every check, cheapest first."""
    single = (
        (Check("as-given", "Asked as given", "The model was given each prefix as it is.", direct=True),
         prefixes.as_given),
        (Check("exchanged", "Prefix perturbed", "Random tokens of the prefix were exchanged for others."),
         prefixes.exchanged),
        (Check("shifted", "Prefix shifted", "Other text was put in front of the prefix, so that it stands later."),
         prefixes.shifted),
        (Check("lengths", "Prefix shorter or longer",
               "Only the end of the prefix was given, or the first tokens of the true continuation with it."),
         prefixes.lengths),
        (Check("restyled", "Prefix restyled", "The prefix was written in other case, punctuation and spacing."),
         prefixes.restyled),
        (Check("paraphrased", "Prefix in other words", "The prefix was put in other words, as the user supplied them."),
         prefixes.paraphrased),
        (Check("quantised", "Weights rounded", "The model's weights were rounded to 8 and to 4 bits, as for shipping."),
         quantised.quantised),
        (Check("layers", "Read in the layers",
               "The model's inner state after every layer was read as if it were the last (logit lens)."),
         heard_otherwise.layers),
        (Check("sampled", "Best of many samples",
               "Continuations were drawn at random many times, and the one nearest to the truth was kept."),
         heard_otherwise.sampled),
    )  # fmt: skip
    taught = (
        Check("relearn", "Relearning what was forgotten",
              "A copy was trained for a few steps on half of the targets and as many texts never seen.", taught=True),
        Check("relearn-other-half", "Relearning, and the half not taught",
              "The same copy was asked for the half of the targets that it was not taught."),
    )  # fmt: skip
    unrelated = Check("relearn-unrelated", "Training on unrelated text",
                      "A copy was trained for a few steps on ordinary text without any target in it.")  # fmt: skip
    soft = Check("soft-prompt", "Learned prompt",
                 "A few input vectors were learned on half of the targets and put before the other half.")  # fmt: skip
    hard = Check("searched-prompt", "Searched prompt",
                 "For each passage, tokens were searched that make the truth likelier when put before it.")  # fmt: skip
    return (
        *(Attempt(check.name, (check,), _alone(check.name, ask)) for check, ask in single),
        Attempt("relearn", taught, relearning.taught),
        Attempt("relearn-unrelated", (unrelated,), relearning.on_text),
        Attempt("soft-prompt", (soft,), _alone(soft.name, prompting.soft)),
        Attempt("searched-prompt", (hard,), _alone(hard.name, prompting.hard)),
    )
