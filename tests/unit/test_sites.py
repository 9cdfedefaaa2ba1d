import pytest

from memloc.errors import InputError
from memloc.sites import OUTSIDE, Kind, Site


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("bias", [False, True])
def test_a_site_is_read_back_from_its_name(kind, bias):
    site = Site(13 if kind.in_block else OUTSIDE, kind, bias)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "name", ["L3", "attn.out", "L3.attn", "3.attn.out", "L-1.attn.out", "L0.embed", "L1.mlp.out.weight"]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(InputError, match="kind"):
        Site.parse(name)


def test_sites_sort_by_layer():
    assert sorted([Site(2, Kind.ATTN_Q), Site(0, Kind.MLP_OUT)])[0].layer == 0
