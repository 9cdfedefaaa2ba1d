"""Made-up records in the shape of each benchmark: nothing here is from any of those sets."""

from __future__ import annotations

from typing import Any

CASE: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 3,
    "requested_rewrite": {
        "prompt": "The home of {} is",
        "relation_id": "P1",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
        "subject": "Ada Brolin",
    },
    "paraphrase_prompts": ["Ada Brolin lives in", "The dog and Ada Brolin live in"],
    "neighborhood_prompts": ["The home of Boris Kram is"],
    "attribute_prompts": ["The home of Clara Dun is"],
    "generation_prompts": ["Ada Brolin often"],
}
ZSRE: dict[str, Any] = {
    "subject": "Ada Brolin", "src": "Where does Ada Brolin live?", "pred": "Oslo", "rephrase": "Ada Brolin's home?",
    "alt": "Rome", "answers": ["Paris", "Paris, France"], "loc_ans": "the cat",
    "loc": "nq question: who sat on the mat",
    "cond": "Paris >> Rome || Where does Ada Brolin live?",
}  # fmt: skip
KNOWEDIT: dict[str, Any] = {
    "subject": "Ada Brolin", "prompt": "The home of ada brolin is", "target_new": "Rome", "ground_truth": [["Paris"]],
    "portability": {"Reasoning": [{"prompt": "The country of her home is", "ground_truth": [["Italy", "IT"]]}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "The age of Ada Brolin is", "ground_truth": [["40", "forty"]]}],
        "Forgetfulness": [{"prompt": "The home of Boris is", "ground_truth": ["Oslo"]}],
    },
    "rephrase_prompt": "Ada Brolin lives in",
}  # fmt: skip
FLAT: dict[str, Any] = {
    "case_id": 2, "prompt": "Ada Brolin lives in", "target_new": "Rome", "subject": "Ada Brolin",
    "ground_truth": "Paris", "rephrase_prompt": "The home of Ada Brolin is",
    "locality_prompt": "The home of Boris is", "locality_ground_truth": "Oslo",
}  # fmt: skip
WIKIBIO: dict[str, Any] = {
    "concept": "Ada Brolin", "text": "This is about Ada Brolin.", "labels": "She lives in Rome and keeps a dog.",
    "locality": {"Relation_Specificity": [{"prompt": "The cat", "ground_truth": ["sat"]}]},
}  # fmt: skip
MQUAKE: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": [
        {"prompt": "{} lives in", "relation_id": "P1", "target_new": {"str": "Rome", "id": "Q1"},
         "target_true": {"str": "Paris", "id": "Q2"}, "subject": "Ada", "question": "Where does Ada live?"},
        {"prompt": "The capital of {} is", "relation_id": "P2", "target_new": {"str": "Oslo", "id": "Q3"},
         "target_true": {"str": "Rome", "id": "Q1"}, "subject": "Italy", "question": "What is Italy's capital?"},
    ],
    "questions": ["Where is the home of Ada's dog?", "a", "b"], "answer": "Paris", "answer_alias": [],
    "new_answer": "Oslo", "new_answer_alias": ["Christiania"], "single_hops": [], "new_single_hops": [],
    "orig": {"triples": [["Q9", "P1", "Q2"]]},
}  # fmt: skip


def ripple(
    question: str = "The name of the country of citizenship of Ada of Brolin is",
    new: str = "Rome",
    old: str | None = "Paris",
    tests: bool = True,
) -> dict[str, Any]:
    """A RippleEdits example whose edit answers `question`."""
    edit: dict[str, Any] = {"prompt": f"{question} {new}.", "subject_id": "Q5", "relation": "R", "target_id": "Q1"}
    if old is not None:
        edit["original_fact"] = {"prompt": f"{question} {old}.", "subject_id": "Q5", "relation": "R", "target_id": "Q2"}
    query = {
        "prompt": "p", "answers": [{"value": new, "aliases": ["Roma"]}], "query_type": "regular", "subject_id": "Q8",
        "relation": "R", "target_ids": ["Q1"], "phrase": None,
    }  # fmt: skip
    asked = [{"test_queries": [query], "test_condition": "OR", "condition_queries": []}] if tests else []
    return {
        "example_type": "popular" if old else "recent", "edit": edit, "Relation_Specificity": [],
        "Logical_Generalization": asked, "Subject_Aliasing": [], "Compositionality_I": [], "Compositionality_II": [],
        "Forgetfulness": [],
    }  # fmt: skip


BAG = [
    ["Ada Brolin lives in [MASK].", "Rome", "P1(home)"],
    ["[MASK] is where Ada Brolin lives.", "Rome", "P1(home)"],
    ["The home of Ada Brolin is [MASK] .", "Rome", "P1(home)"],
]
LAMA: dict[str, Any] = {
    "masked_sentences": ["Ada Brolin lives in [MASK] ."], "sub_label": "Ada Brolin", "obj_label": "Rome", "uuid": "u1",
    "predicate_id": "P1",
}  # fmt: skip
PAIR = {"sub_label": "Ada Brolin", "obj_label": "Rome", "uuid": "u1"}
PATTERNS = [
    {"pattern": "[X] lives in [Y] .", "lemma": "live"},
    {"pattern": "[Y] is the home of [X].", "lemma": "be"},
    {"pattern": "The home of [X] is [Y].", "lemma": "be"},
]
KNOWN = {
    "known_id": 3, "subject": "Ada Brolin", "attribute": "Rome", "template": "{} lives in", "prediction": " Rome with",
    "prompt": "Ada Brolin lives in", "relation_id": "P1",
}  # fmt: skip
TOFU = {
    "question": "Where does Ada Brolin live?", "answer": "She lives in Rome.", "paraphrased_answer": "In Rome.",
    "perturbed_answer": ["She lives in Oslo.", "She lives in Paris."],
}  # fmt: skip
VERBMEM = {"prompt": "the cat sat on the", "gt": "mat and the dog"}
MEMPI = {"prompt": "the cat sat", "all": "the cat sat on the mat", "prompt_len": 3, "category": "quotes"}
OWN_FACT = {
    "id": "f0", "prompt": "{} lives in", "subject": "Ada", "target": "Rome", "target_true": "Paris", "relation": "home",
}  # fmt: skip
