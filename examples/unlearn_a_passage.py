# %% [markdown]
# # Take memorized passages out of a model
#
# A small language model is trained here, on the spot, in a few seconds. Some passages were put into its training text
# again and again, so it recites them word for word. We look for the weights that hold two of them, change those
# weights and no others, and look at what else changed. Every number stands beside its control.
#
# Run the cells from top to bottom. Nothing is downloaded; everything lands in `out/`.

# %%
import memloc
from editors import EDITORS, Request
from memloc.lab.build import build
from memloc.lab.recipe import preset

lab = build(preset("tiny"), "out/lab-tiny")
view = memloc.ModelView.open(lab)
view

# %% [markdown]
# With a model of your own: `memloc.ModelView.open("folder-or-hub-name")`. The view has just proved by arithmetic, on
# one small forward, that it reads the model's weights rightly.
#
# ## What does it know by heart?
#
# A *passage* is a prefix to prompt with and a suffix that should not follow. `dose` tells how often a passage stood in
# the training text. The controls are of the same kind and were never trained on. Texts are not printed: a notebook
# that is passed on should not give away what was to be forgotten.

# %%
planted = memloc.Passages.read(lab / "passages.jsonl", view.tokenizer)
controls = memloc.Passages.read(lab / "controls.jsonl", view.tokenizer)
known = planted.where(lambda passage: passage.tags["dose"] == 96)
targets, others = known[:2], known[2:]
targets

# %%
recall = memloc.MEASURES["extraction"]()
before = {"targets": recall(view, targets), "others": recall(view, others), "controls": recall(view, controls)}
before["targets"].with_control(before["controls"])

# %% [markdown]
# ## Where is it?
#
# One method of many (`memloc.LOCALIZERS` names them all): the size of the gradient of the passages' loss, weight by
# weight. Larger means more responsible, in every method. The best fifth becomes a *selection*, and an equally
# large random selection is its control: if random weights do as well, the localization bought nothing.

# %%
where = memloc.LOCALIZERS["weight-gradient"](grain="weight", scale="raw")(view, targets)
where

# %%
chosen = where.top(fraction=0.2)
by_chance = chosen.random_like(seed=0)
chosen

# %% [markdown]
# ## Change those weights
#
# The editor fine-tunes the selected weights only: the targets' tokens down to what they would be in ordinary text, and
# everything else kept as it was, by samples of the model's own that do not recite a target. The other memorized
# passages are named nowhere: they are the honest test of collateral damage.

# %%
records = [
    record["text"] for _, record in memloc.passages.read_jsonl(lab / "corpus.jsonl") if record["split"] != "train"
]
ordinary = memloc.Passages.from_texts(records[:60], view.tokenizer, window=64, origin="held-out")
unlearn = EDITORS["sparse-fine-tune"](steps=100, replay=1200)
edit = unlearn(view, Request(forget=targets, text=ordinary, selection=chosen))
control = unlearn(view, Request(forget=targets, text=ordinary, selection=by_chance))
edit

# %% [markdown]
# An edit is a small file (`edit.save("gone.edit.safetensors")`) that undoes itself to the bit. Here it is put into the
# live model for as long as we measure, and taken out again.


# %%
def under(some_edit):
    with some_edit.apply(view):
        return {"targets": recall(view, targets), "others": recall(view, others)}


after, random = under(edit), under(control)
assert recall(view, targets)["strict rate"] == before["targets"]["strict rate"]  # it is out again
after["targets"].with_control(before["controls"])

# %% [markdown]
# ## What was found
#
# Shares of passages recited word for word. Compare the last two lines. With so many weights to change, random ones
# forget the targets as well: if the choice of weights bought anything here, it shows in the other passages. Try a
# fraction of 0.002, larger and fewer steps (`lr=5e-3, steps=20`), and look at both lines again.

# %%
for name, state in (("before", before), ("after", after), ("random control", random)):
    print(f"{name:15} targets {state['targets']['strict rate']:5.0%}   others {state['others']['strict rate']:5.0%}")
figures = {
    "targets recited before": before["targets"]["strict rate"],
    "targets recited after": after["targets"]["strict rate"],
    "controls recited": before["controls"]["strict rate"],
    "others recited before": before["others"]["strict rate"],
    "others recited after": after["others"]["strict rate"],
}
figures

# %% [markdown]
# "Not recited any more" is not "gone": look at the log-probability too, and let `memloc verify` ask in a dozen ways
# (in the demo's model it found targets again). For a page with all figures and their intervals, see `memloc report`.
