"""What figures and words mean, in plain language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """What is known of a figure: its plain label, which way is progress for whoever forgets, and one sentence."""

    label: str
    better: str
    meaning: str


FIGURES: Mapping[str, Known] = {
    "strict rate": Known(
        "Recited word for word",
        "lower",
        "Share of passages whose whole continuation the model writes exactly when it always takes its likeliest "
        "next token (greedy decoding): “strict extraction”. One wrong token and a passage no longer counts, so this "
        "figure alone does not prove that a passage is gone.",
    ),
    "first miss": Known(
        "Tokens recited before the first error",
        "lower",
        "How many tokens of the true continuation the model writes correctly before its first mistake; the mean "
        "over passages.",
    ),
    "median log p_z": Known(
        "Log-probability of the true text",
        "lower",
        "log p_z is the natural logarithm of the probability that one sampled continuation is the true text, whole. "
        "0 means certain; −142 means about one chance in 10⁶². The median over passages. Comparable only with text "
        "of the same length, which is what the never-seen column is for.",
    ),
    "log10 p_z": Known(
        "Power of ten of that probability",
        "lower",
        "The same probability in powers of ten: −6 is one in a million.",
    ),
    "queries to leak any": Known(
        "Attempts until one passage leaks",
        "higher",
        "How many sampled continuations of each passage it takes until at least one of the passages has come out "
        "whole, with the confidence named in the settings. ∞ means that sampling cannot produce it.",
    ),
    "expected leaks": Known(
        "Passages expected to leak",
        "lower",
        "How many passages one should expect to see whole, when each is sampled as often as the settings say.",
    ),
    "exact memorization": Known(
        "Tokens predicted correctly",
        "lower",
        "Share of the continuation's tokens that are the model's first choice when all true tokens before them are "
        "given. Ordinary text scores well above zero, hence the controls.",
    ),
    "extraction strength": Known(
        "Share recited to the end",
        "lower",
        "Share of the continuation that the model completes without error to its end, given the true text up to "
        "some point.",
    ),
    "mean nll": Known(
        "Surprise per token",
        "higher",
        "Negative log-likelihood in nats per token: how surprised the model is by the true continuation.",
    ),
    "nll": Known("Surprise per token", "lower", "Negative log-likelihood in nats per token; lower is more fluent."),
    "perplexity": Known(
        "Perplexity",
        "lower",
        "How many tokens the model hesitates between, on average, on ordinary text: the exponential of its surprise "
        "per token. The usual check that a change has not damaged the model elsewhere.",
    ),
    "efficacy success": Known(
        "New answer preferred", "higher", "The edited question: the new answer is likelier than the old one."
    ),
    "efficacy accuracy": Known(
        "New answer given", "higher", "The edited question: the model's likeliest answer is exactly the new one."
    ),
    "paraphrase success": Known(
        "New answer preferred, asked differently",
        "higher",
        "Other phrasings of the edited question: the new answer is likelier than the old one.",
    ),
    "paraphrase accuracy": Known(
        "New answer given, asked differently", "higher", "Other phrasings: the likeliest answer is exactly the new one."
    ),
    "neighbour success": Known(
        "Neighbouring facts kept",
        "higher",
        "Questions about other subjects: their own answer is still likelier than the edit's.",
    ),
    "neighbour accuracy": Known(
        "Neighbouring answers still given",
        "higher",
        "Questions about other subjects: the likeliest answer is still their own.",
    ),
    "written alike": Known(
        "Written alike to the end",
        "",
        "Share of prompts after which the model writes, token by token, what it wrote before the edit.",
    ),
    "agreement": Known(
        "Written alike, until the first difference",
        "",
        "How far into its own continuation of ordinary text the model still writes what it wrote before the edit, as a "
        "share of its length. One exchanged token ends it, so any change of the weights lowers it: compare with the "
        "random control.",
    ),
    "edit distance": Known(
        "Tokens to exchange, insert or delete",
        "",
        "Levenshtein distance between what the model writes and what it wrote before the edit, as a share of its "
        "length.",
    ),
    "repeated 4-grams": Known(
        "Repeats itself",
        "",
        "Share of groups of four tokens that already stood in the same continuation: a broken model repeats itself.",
    ),
    "token entropy": Known(
        "Variety of its words", "", "Entropy of the tokens of one continuation, in nats: a broken model uses few."
    ),
    "fragile rows": Known(
        "Verdicts that hang on a tie", "", "Passages whose verdict depends on a tie between equally likely tokens."
    ),
    "excess strict rate": Known(
        "Recited, beyond the never-seen texts",
        "lower",
        "The rate of passages recited word for word minus the same rate of texts never seen.",
    ),
    "inside controls' range": Known(
        "No likelier than text never seen",
        "higher",
        "Share of passages whose log p_z is at most the largest among the never-seen texts: the aim of forgetting.",
    ),
    "below controls' range": Known(
        "Unlikelier than any text never seen",
        "",
        "Share of passages whose log p_z is below the smallest among the never-seen texts: forgotten so hard that "
        "the absence itself can be noticed.",
    ),
    "flagged against controls": Known(
        "Still stand out from text never seen",
        "lower",
        "Share of passages that a test with at most 5 % false alarms tells apart from text never seen (conformal p).",
    ),
    "true accuracy": Known("Old answer given", "", "The edited question: the likeliest answer is exactly the old one."),
    "paraphrase true accuracy": Known(
        "Old answer given, asked differently", "", "Other phrasings: the likeliest answer is exactly the old one."
    ),
    "score": Known(
        "Harmonic mean of the three successes",
        "higher",
        "One number for efficacy, paraphrase and neighbour success; it is low as soon as one of them is.",
    ),
}

TERMS: Mapping[str, str] = {
    "passage": "A piece of text cut in two: a prefix, which the model is given, and a suffix, which it may know.",
    "token": "The unit a model reads and writes: a word, or a part of one.",
    "before, after": "The same measurement on the model as it came and on the edited model, passage by passage.",
    "random control of equal size": "The same edit made to equally many places chosen at random. What it changes too "
    "is not to the credit of the localization.",
    "never-seen controls": "Texts of the same kind that the model was never trained on. They show what the figure is "
    "when there is nothing to remember, hence the level to edit down to and not below.",
    "95 % interval": "The range of values that these passages are compatible with. Wilson for rates (with 0 of n, the "
    "largest rate that n passages cannot rule out: 1 − 0.05^(1/n)); Newcombe's paired interval for a change of a "
    "rate; paired bootstrap over passages for other changes.",
    "flip": "A passage whose verdict differs between two models. McNemar's exact p says how surprising the split of "
    "flips would be if both directions were equally likely.",
    "localization": "A score for every place in the network: larger means more responsible.",
    "digest": "A fingerprint (SHA-256) of data: equal fingerprints mean equal to the bit. Whoever holds a text can "
    "recognise it by its digest; a very short or guessable text can be guessed from it.",
}
