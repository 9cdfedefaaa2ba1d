"""Places in other libraries' words and back, without either library."""

import pytest

from memloc.architectures import ROWS
from memloc.engines.names import LensNames, NnsightNames, exported
from memloc.errors import InputError
from memloc.scores import selected
from memloc.sites import MAPS, OUTSIDE, Grain, Kind, Site

SITES = [Site(3 if kind.in_block else OUTSIDE, kind) for kind in MAPS if kind is not Kind.MLP_ROUTER]


@pytest.mark.parametrize("side", ["input", "output"])
def test_every_hook_name_comes_back_as_its_site(side):
    names = LensNames()
    told = [names.name(site, side) for site in SITES]
    assert len(set(told)) == len(told)
    assert [names.parse(name) for name in told] == [(site, side) for site in SITES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.family)
def test_every_path_comes_back_as_its_site(row):
    names = NnsightNames(row)
    for site in SITES:
        if row.experts is not None and site.kind.of_experts:
            with pytest.raises(InputError, match=f"{site}: no path shows what happens inside a mixture of experts"):
                names.name(site)
            continue
        if site.kind.in_block and (row.path(site.kind) is None):
            with pytest.raises(InputError, match=f"{site}: not in {row.family}"):
                names.name(site)
            continue
        path = names.name(site, "output")
        sharing = [k for k in MAPS if k.in_block and site.kind.in_block and row.path(k) == row.path(site.kind)]
        if len(sharing) > 1:
            with pytest.raises(InputError, match=f"a fused map of {row.family}, shared by"):
                names.parse(path)
        else:
            assert names.parse(path) == (site, "output")


def test_names_are_the_libraries_own():
    gpt2 = next(row for row in ROWS if row.family == "GPT-2")
    site = Site(3, Kind.MLP_OUT)
    assert LensNames().name(site) == "blocks.3.mlp.hook_post"
    assert LensNames().name(Site(3, Kind.ATTN_OUT)) == "blocks.3.attn.hook_z"
    assert NnsightNames(gpt2).name(site) == "transformer.h[3].mlp.c_proj.input"
    assert LensNames(gated=True).parse("blocks.0.mlp.hook_pre") == (Site(0, Kind.MLP_GATE), "output")
    assert LensNames(gated=False).parse("blocks.0.mlp.hook_pre") == (Site(0, Kind.MLP_IN), "output")


@pytest.mark.parametrize(
    ("names", "name", "told"),
    [
        (LensNames(), "blocks.0.mlp.hook_pre", r"mlp\.gate where the MLP has a gate, else mlp\.in"),
        (LensNames(), "blocks.0.hook_resid_post", "not a side of one linear map"),
        (LensNames(), "attn.hook_z", "not a side of one linear map"),
        (LensNames(), "blocks.0.embed.hook_in", "not a side of one linear map"),
        (NnsightNames(ROWS[0]), "transformer.h[0].mlp.output", r"such is transformer\.h\[0\]\.mlp\.c_proj\.input"),
        (NnsightNames(ROWS[0]), "transformer.h[0].mlp.c_proj.weight", "not a side of one linear map"),
    ],
)
def test_a_name_of_something_else_is_refused(names, name, told):
    with pytest.raises(InputError, match=told):
        names.parse(name)


def test_what_has_no_tensor_of_its_own_is_refused():
    site = Site(0, Kind.MLP_OUT)
    with pytest.raises(InputError, match="weights have no hook name or path of their own; those that have: neuron"):
        exported(selected({site: [1]}, {site: 4}, Grain.WEIGHT), LensNames())
    with pytest.raises(InputError, match="give NnsightNames their head_width"):
        exported(selected({site: [1]}, {site: 4}, Grain.HEAD), NnsightNames(ROWS[0]))
    with pytest.raises(InputError, match="no hook shows a bias"):
        LensNames().name(Site(0, Kind.MLP_OUT, bias=True))
    layer = exported(selected({site: [0]}, {site: 1}, Grain.LAYER), LensNames())
    assert [(one.name, one.entry, one.index) for one in layer] == [("blocks.0.hook_resid_post", None, "")]
