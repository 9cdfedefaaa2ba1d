# %% [markdown]
# # Which parts does recitation need? An ablation sweep
#
# A small model is trained here in a few seconds; it recites some passages word for word. We silence its layers, its
# sublayers and its heads, each alone, and look at the passages and at ordinary text side by side: a part that
# recitation needs and ordinary text does not is the interesting one.
#
# Run the cells from top to bottom. Nothing is downloaded; everything lands in `out/`.

# %%
import memloc
from memloc.grids.grid import Grid
from memloc.grids.plots import effect_map
from memloc.grids.run import sweep
from memloc.lab.build import build
from memloc.lab.recipe import preset
from memloc.notebook import Drawing

lab = build(preset("tiny"), "out/lab-tiny")
view = memloc.ModelView.open(lab)
view

# %% [markdown]
# A sweep is a table of what is ablated, how, and what is measured. The same table can stand in a TOML file and be run
# from the shell: `memloc ablate grid.toml --out out/sweep` (see `scripts/ablations/`).

# %%
grid = Grid.of(
    {
        "model": str(lab.resolve()),
        "data": {
            "recited": {"passages": f"{lab.resolve()}/passages.jsonl#dose=96"},
            "ordinary": {"text": f"{lab.resolve()}/corpus.jsonl#split=held-out", "limit": 16},
        },
        "measure": [
            {"name": "extraction", "data": "recited", "figures": ["strict rate", "mean nll"]},
            {"name": "perplexity", "data": "ordinary", "figures": ["perplexity"]},
        ],
        "ablate": [
            {"name": "sublayers", "every": "component", "how": "zero"},
            {"name": "heads", "every": "head", "how": "zero"},
        ],
    }
)
rows = sweep(grid, "out/sweep-tiny", plots=False)
len(rows)

# %% [markdown]
# Every cell is kept under `out/sweep-tiny/cells`, so an interrupted sweep goes on where it stopped; `table.csv` is the
# tidy table with a row for each ablation and figure, its baseline and the interval of the difference.


# %%
def effects(figure, name):
    """Part to (value, baseline) of one figure, for one set of ablations."""
    return {row.components: (row.value, row.baseline) for row in rows if row.figure == figure and row.set == name}


for name in ("sublayers", "heads"):
    recited, fluent = effects("mean nll", name), effects("perplexity", name)
    print(f"{name:12} surprise of the passages, nats/token     perplexity of ordinary text")
    for part, (value, baseline) in recited.items():
        other, was = fluent[part]
        print(f"  {part:12} {baseline:8.2f} -> {value:6.2f} {'':22} {was:8.0f} -> {other:6.0f}")

# %% [markdown]
# The same as a picture. Every plot of memloc draws on an axis it is given, so it fits into figures of your own.

# %%
shown = [row for row in rows if row.set == "sublayers" and row.figure == "mean nll"]
Drawing(lambda ax: effect_map(ax, shown), "Rise of the passages' surprise when a sublayer is silenced.")

# %% [markdown]
# ## What was found
#
# Two sublayers can be silenced with hardly any harm to the recital, and one cannot. Compare with the column of
# ordinary text before calling any of them the place of the memory: a model that no longer speaks recites nothing.

# %%
recited = effects("mean nll", "sublayers")
figures = {"baseline nll": next(iter(recited.values()))[1]} | {
    f"nll without {part}": v for part, (v, _) in recited.items()
}
figures
