import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from memloc.errors import ArtifactError, InputError, MismatchError
from memloc.moments import Moments, second_moments
from memloc.passages import Passage, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

VOCAB = 37


@pytest.fixture
def view():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=12, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=1
    )
    return ModelView.open(GPT2LMHeadModel(config).double())


@pytest.fixture
def text():
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCAB, (size,), generator=draw).tolist() for size in (9, 3, 16, 7, 2, 11)]
    return Passages(tuple(Passage(f"t{index}", tuple(row[:1]), tuple(row[1:])) for index, row in enumerate(rows)))


def naive(view, text, site):
    """One passage at a time, one token at a time, no padding anywhere."""
    total, count = 0, 0
    for item in text:
        seen = []
        hook = view.module(site).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            view.model(torch.tensor([item.ids]))
        hook.remove()
        for key in seen[0][0]:
            total = total + torch.outer(key, key)
            count += 1
    return total / count


def test_equal_to_a_loop_over_tokens(view, text):
    sites = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    found = second_moments(view, text, sites)
    assert found.count == sum(len(item.ids) for item in text)
    for site in sites:
        torch.testing.assert_close(found.mean(site), naive(view, text, site), rtol=1e-12, atol=1e-12)


def test_gated_mlp_too(text):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
    view = ModelView.open(LlamaForCausalLM(config).double())
    site = Site(1, Kind.MLP_OUT)
    found = second_moments(view, text, [site])
    assert found.mean(site).shape == (20, 20)
    torch.testing.assert_close(found.mean(site), naive(view, text, site), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size_and_padding_do_not_matter(view, text, size):
    site = Site(2, Kind.MLP_OUT)
    torch.testing.assert_close(
        second_moments(view, text, [site], size=size).mean(site),
        second_moments(view, text, [site], size=64).mean(site), rtol=1e-12, atol=1e-12,
    )  # fmt: skip


def test_merged_halves_are_the_whole(view, text):
    sites = view.sites(Kind.MLP_OUT)
    whole = second_moments(view, text, sites)
    merged = second_moments(view, text[:2], sites).merge(second_moments(view, text[2:], sites))
    assert merged.count == whole.count
    for site in sites:
        torch.testing.assert_close(merged.mean(site), whole.mean(site), rtol=1e-12, atol=1e-12)


def test_merge_refuses_the_same_text_twice_and_other_models(view, text):
    site = Site(0, Kind.MLP_OUT)
    found = second_moments(view, text, [site])
    with pytest.raises(MismatchError, match="would count twice"):
        found.merge(found)
    both = second_moments(view, text[:2], [site]).merge(second_moments(view, text[2:], [site]))
    with pytest.raises(MismatchError, match="would count twice"):
        both.merge(second_moments(view, text[2:], [site]))
    with torch.no_grad():
        next(view.model.parameters()).add_(1)
    with pytest.raises(MismatchError, match="another model"):
        found.merge(second_moments(view, text[:2], [site]))


def test_the_forward_stops_after_the_highest_site(view, text):
    reached = []
    view.block(2).register_forward_pre_hook(lambda *_: reached.append(2))
    second_moments(view, text, [Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT)])
    assert reached == []
    second_moments(view, text, [Site(2, Kind.MLP_OUT)])
    assert reached != []


def test_survives_the_disk(view, text, tmp_path):
    found = second_moments(view, text, view.sites(Kind.MLP_OUT))
    found.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    assert (again.digest, again.count, again.provenance) == (found.digest, found.count, found.provenance)
    assert again.provenance.inputs == {"model": view.digest, "text": text.digest}
    with pytest.raises(ArtifactError, match="no such file"):
        Moments.load(tmp_path / "other.safetensors")


def test_nothing_to_count_is_refused(view, text):
    site = Site(0, Kind.MLP_OUT)
    with pytest.raises(InputError, match="over 0 passages"):
        second_moments(view, text[:0], [site])
    with pytest.raises(InputError, match=r"no second moment of L1\.mlp\.out; there are those of L0\.mlp\.out"):
        second_moments(view, text, [site]).mean(Site(1, Kind.MLP_OUT))
    with pytest.raises(InputError, match="not finite"):
        Moments({site: torch.full((2, 2), float("nan"))}, 1, second_moments(view, text, [site]).provenance)
