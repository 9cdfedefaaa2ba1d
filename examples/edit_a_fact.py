# %% [markdown]
# # Change one fact, and see what else moves
#
# A small model is trained here in a few seconds, on sentences about invented people. We ask it for the home town of
# one of them, change the answer by the gentlest rank-one change of one matrix (ROME), and ask three things: is the new
# answer given, is it given when the question is put in other words, and do other people keep their own answers?
#
# Run the cells from top to bottom. Nothing is downloaded; everything lands in `out/`.

# %%
import memloc
from editors import EDITORS, Request, random_like
from memloc.lab.build import build
from memloc.lab.recipe import preset

lab = build(preset("tiny"), "out/lab-tiny")
view = memloc.ModelView.open(lab)
facts = memloc.Facts.read(lab / "facts.jsonl", view.tokenizer)
facts

# %% [markdown]
# A fact is a prompt with a subject, its present answer and a wanted one, with other phrasings (paraphrases) and prompts
# about other subjects (neighbours). The people are invented, so here is one in plain words:

# %%
one = facts[:1]
fact = one[0]
print(f"{fact.prompt.text} … now {fact.target_true_text!r}, wanted {fact.target_text!r}")

# %% [markdown]
# ## Where does the answer come from?
#
# A causal trace: the subject is blurred, and one clean state at a time is put back. Scores are the probability of the
# answer that comes back, for each token in each layer.

# %%
trace = memloc.LOCALIZERS["causal-trace"](draws=4)(view, one.as_passages())
trace

# %% [markdown]
# ## The edit
#
# ROME needs ordinary text, to know which directions of the matrix are busy and should move least.

# %%
records = [
    record["text"] for _, record in memloc.passages.read_jsonl(lab / "corpus.jsonl") if record["split"] != "train"
]
ordinary = memloc.Passages.from_texts(records[:60], view.tokenizer, window=64, origin="held-out")
edit = EDITORS["rome"]()(view, Request(facts=one, text=ordinary))
edit

# %% [markdown]
# ## Before, after, and a random change of equal size
#
# The control is a rank-one change of the same matrix with the same norm, in no particular direction.

# %%
recall = memloc.MEASURES["facts"]()
before = recall(view, one)
with edit.apply(view):
    after = recall(view, one)
with random_like(edit, view, seed=0).apply(view):
    random = recall(view, one)
after

# %%
names = ("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy")
for name in names:
    print(f"{name:20} before {before[name]:4.0%}   after {after[name]:4.0%}   random control {random[name]:4.0%}")
figures = {f"{name}, {when}": found[name] for name in names for when, found in (("before", before), ("after", after))}
figures

# %% [markdown]
# There are three neighbours only, so each weighs 33 points; when the random change loses one too, that loss says
# nothing about ROME.
#
# The edit is a file: `edit.save("fact.edit.safetensors")`; `memloc apply` writes a checkpoint with it that plain
# transformers loads, and `memloc undo` gives the first one back, byte for byte. One fact of one small model is an
# example and no evidence: `make demo` does twenty facts and states the intervals.
