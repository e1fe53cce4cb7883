"""Folding changes the weights and not the model: against float64, per head, and through the packed cache."""

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitNetConfig, GPT2Config, OlmoConfig, OPTConfig, PhiConfig

from tq_ao import TurboQuantCache, TurboQuantConfig, fold, hf
from tq_ao.cache import head_dim, kv_heads, quantizable_layers
from tq_ao.checkpoint import find_stored
from tq_ao.errors import ModelError
from tq_ao.measure.metrics import score, summarize
from tq_ao.rotation import LayerMaps, MapSource, rotations

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}
KINDS = ["llama", "qwen2", "gemma2", "gemma3", "opt", "phi"]


def made(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model; biases are random too."""
    others = {"opt": OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64), "phi": PhiConfig(**SMALL)}
    model = AutoModelForCausalLM.from_config(others[kind]).eval() if kind in others else tiny.model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("v_proj.bias", "o_proj.bias")):
                parameter.normal_()
    return model.to(dtype)


def random_maps(rng: torch.Generator, heads: int, dim: int) -> LayerMaps:
    """Maps of values that are no rotation and not symmetric, shifts, feedback, and a read-out with a gain."""

    def turn():
        return rotations("dense", heads, dim, int(torch.randint(1 << 20, (), generator=rng)))

    stretch = torch.exp(0.4 * torch.randn(heads, dim, 1, generator=rng))
    key, value = turn(), turn() @ (stretch * turn())
    shift = [torch.randn(heads, dim, generator=rng) for _ in range(2)]
    feedback = 0.1 * torch.randn(heads, dim // 2, dim // 2, generator=rng)
    output = 1.03 * torch.linalg.inv(value)
    return LayerMaps(key, key.clone(), value, output, shift[0], shift[1], None, feedback)


def maps_of(model: nn.Module, rng: torch.Generator) -> dict[int, LayerMaps]:
    config = model.config.get_text_config(decoder=True)
    return {i: random_maps(rng, kv_heads(config), head_dim(config)) for i in quantizable_layers(model.config)}


def folded(model: nn.Module, maps: dict[int, LayerMaps], folder) -> fold.Folded:
    """Fold a model as its checkpoint in `folder` says."""
    model.save_pretrained(folder)
    names = [name for a in fold.find(model, maps).values() for name in a.parameters()]
    return fold.fold_(model, maps, find_stored(folder, names, model.base_model_prefix))


@pytest.mark.parametrize("shape", [(96, 40), (96,)], ids=["weight", "bias"])
def test_value_side_by_head(shape, rng):
    weight, maps = torch.randn(shape, generator=rng, dtype=torch.float64), random_maps(rng, 3, 32)
    got = fold.fold_value(weight, maps.value)
    for h in range(3):
        rows = slice(32 * h, 32 * h + 32)
        torch.testing.assert_close(got[rows], maps.value[h].double().mT @ weight[rows], rtol=1e-12, atol=1e-12)


def test_output_side_by_head(rng):
    weight, maps = torch.randn(40, 6 * 32, generator=rng, dtype=torch.float64), random_maps(rng, 3, 32)
    got = fold.fold_output(weight, maps.value)
    for q in range(6):
        columns, inverse = slice(32 * q, 32 * q + 32), torch.linalg.inv(maps.value[q // 2].double())
        torch.testing.assert_close(got[:, columns], weight[:, columns] @ inverse.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_computes_what_it_did(kind, rng, tmp_path):
    model = made(kind)
    ids = torch.randint(2, 97, (2, 50), generator=rng)
    want = model(ids).logits
    change = folded(model, maps_of(model, rng), tmp_path)
    assert len(change.by) == len(quantizable_layers(model.config))
    assert len(change.weights) == (3 if kind in ("qwen2", "opt", "phi") else 2) * len(change.by)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-8, atol=1e-8)
    new = {name: p for name, p in model.named_parameters() if name in change.weights}
    assert all(torch.equal(change.weights[name], p) for name, p in new.items())
    with change.original():
        assert torch.equal(model(ids).logits, want)
        assert not any(torch.equal(change.weights[name], p) for name, p in new.items())
    assert all(torch.equal(change.weights[name], p) for name, p in new.items())
    change.undo()
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("wrong", ["value transposed", "output not transposed", "query heads in another order"])
@torch.no_grad()
def test_a_wrong_formula_is_not_within_the_limit(wrong, rng, tmp_path, monkeypatch):
    right, other = fold.fold_value, fold.fold_output
    if wrong == "value transposed":
        monkeypatch.setattr(fold, "fold_value", lambda w, v: right(w, v.mT))
    elif wrong == "output not transposed":
        monkeypatch.setattr(fold, "fold_output", lambda w, v: other(w, v.mT))
    else:
        monkeypatch.setattr(fold, "fold_output", lambda w, v: other(w, v.flip(0)))
    model = made("llama", torch.float32)
    ids = torch.randint(2, 97, (1, 100), generator=rng)
    want = model(ids).logits
    change = folded(model, maps_of(model, rng), tmp_path)
    where = torch.arange(100)
    with pytest.raises(ModelError, match="expected a KL below 0.001 to the original with an exact cache, got .*leave"):
        fold.within_limit(summarize([score(want, model(ids).logits, ids, where)]).kl)
    with change.original():
        assert fold.within_limit(summarize([score(want, model(ids).logits, ids, where)]).kl) < 1e-6
    with pytest.raises(ModelError, match="got nan"):
        fold.within_limit(float("nan"))


@torch.no_grad()
def read_through(model: nn.Module, maps: MapSource, ids: torch.Tensor) -> tuple[torch.Tensor, TurboQuantCache]:
    """Logits of the last 40 tokens, which read what is packed of the rest."""
    config = TurboQuantConfig(k_bits=4, v_bits=2, window=32)
    cache = TurboQuantCache(model.config, config, maps)
    model(ids[:, :-40], **{tiny.CACHE: cache}, use_cache=True)
    return model(ids[:, -40:], **{tiny.CACHE: cache}, use_cache=True).logits, cache


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_packed_cache_holds_the_same_codes(kind, rng, tmp_path):
    model = hf.attach(made(kind, torch.float32), TurboQuantConfig())
    maps = maps_of(model, rng)
    source, plain = MapSource("hadamard", 0, maps), MapSource("hadamard", 5)
    ids = torch.randint(2, 97, (2, 300), generator=rng)
    want, before = read_through(model, source, ids)
    rotated, _ = read_through(model, plain, ids)
    change = folded(model, maps, tmp_path)
    assert all(torch.equal(m.value, torch.eye(32).expand(2, 32, 32)) for m in change.maps.values())
    got, after = read_through(model, MapSource("hadamard", 0, change.maps), ids)
    old, new = before.packed_layers()[0], after.packed_layers()[0]  # what comes in is the same to the last bit
    assert torch.equal(old.k_codes, new.k_codes)
    assert (old.v_codes == new.v_codes).float().mean() > 0.99, "but for values at the edge of two levels"
    where = torch.arange(40)

    def kl(a, b):
        return summarize([score(a, b, ids[:, -40:], where)]).kl

    noise = kl(want, rotated)
    assert kl(want, got) < 0.05 * noise, "what two roundings of the same values differ by"
    seen, _ = read_through(model, fold.seen_through(plain, change.by), ids)
    assert kl(rotated, seen) < 0.05 * noise
    unfolded, _ = read_through(model, source, ids)
    assert kl(want, unfolded) > 0.2 * noise, "maps of the model that it was"


def test_maps_of_a_folded_model(rng):
    maps, other = random_maps(rng, 2, 32), random_maps(rng, 2, 32)
    v = torch.randn(2, 50, 32, generator=rng)
    for by in (maps.value, other.value):
        new = fold.folded_maps(maps, by)
        torch.testing.assert_close(
            (v @ by - new.value_shift[:, None]) @ new.value, (v - maps.value_shift[:, None]) @ maps.value,
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip
        torch.testing.assert_close(v @ new.output, v @ maps.output @ by, rtol=1e-3, atol=1e-3)
        for name in ("key", "query", "key_shift", "value_feedback"):
            assert torch.equal(getattr(new, name), getattr(maps, name))


def with_quantised_weights():
    config = tiny.config("llama")
    config.quantization_config = {"quant_method": "torchao"}
    return config


REFUSED = {
    "fused": (
        lambda: tiny.config("phi4_mini"),
        "v_proj and o_proj as plain nn.Linear in layer 0, got .*qkv_proj",
    ),
    "fused, other names": (lambda: GPT2Config(n_embd=64, n_head=2, n_layer=2), "v_proj and c_proj as plain .*'c_attn'"),
    "clipped": (lambda: OlmoConfig(**SMALL, clip_qkv=3.0), "got clipped values .clip_qkv 3.0"),
    "quantised": (with_quantised_weights, "weights in a plain dtype, got quantised ones"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_refused_by_their_config(kind):
    config, says = REFUSED[kind]
    with pytest.raises(ModelError, match=f"to fold values expected .*{says}.*; leave --fold-values out"):
        fold.check_config(config(), [0, 1])


def test_a_config_says_what_will_change():
    names, prefix = fold.check_config(tiny.config("qwen2"), [1])
    assert prefix == "model"
    assert names == [f"model.layers.1.self_attn.{name}" for name in ("v_proj.weight", "o_proj.weight", "v_proj.bias")]


def tie(model):
    model.model.layers[2].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def normalise(model):
    model.model.layers[1].self_attn.v_norm = nn.RMSNorm(32)


def share(model):
    model.config.num_kv_shared_layers = 1


def narrow(model):
    model.model.layers[1].self_attn.v_proj = nn.Linear(64, 32, bias=False)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(model):
    model.model.layers[0].self_attn.o_proj = Doubled(128, 64, bias=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (tie, r"v_proj.weight to be one layer's own, got a tensor tied as \['model.layers.0.self_attn.v_proj.weight'"),
        (normalise, "values as v_proj makes them in layer 1, got a norm on them .v_norm"),
        (share, "got layers that share keys and values"),
        (narrow, r"v_proj to make and o_proj to read \(64, 128\) values in layer 1, got \(32, 128\)"),
        (subclass, "as plain nn.Linear in layer 0, got .*Doubled"),
    ],
)
def test_modules_that_are_refused(change, says, rng):
    model = tiny.model()
    fold.find(model, [0, 1, 2])
    change(model)
    with pytest.raises(ModelError, match=says):
        fold.find(model, [0, 1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_of_values_is_looked_at(kind, rng):
    model = made(kind, torch.float32)
    layers, ids = quantizable_layers(model.config), torch.randint(2, 97, (1, 20), generator=rng)
    before = model.config._attn_implementation
    fold.check_path(model, layers, ids)
    assert model.config._attn_implementation == before and not model(ids).logits.isnan().any()
    parts = fold.find(model, layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for a in parts.values() for m in (a.v_proj, a.o_proj))
    gate = parts[layers[-1]].o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(ModelError, match=f"layer {layers[-1]} to read what attention gives, got something else"):
        fold.check_path(model, layers, ids)
    gate.remove()


def test_a_norm_before_o_proj_is_found():
    model = AutoModelForCausalLM.from_config(BitNetConfig(**SMALL, num_key_value_heads=2, intermediate_size=96)).eval()
    with pytest.raises(ModelError, match="bitnet: .*o_proj of layer 0 to read what attention gives"):
        fold.check_path(model, [0, 1], torch.arange(2, 20)[None])


def test_values_that_change_on_their_way_are_found(rng, monkeypatch):
    """As by a norm or a clip that is no module."""
    model, real = tiny.model(), fold.intercept

    def changed(model, handler):
        return real(model, lambda call: handler(fold.replace(call, v=call.v * 1.01) if call.layer == 2 else call))

    monkeypatch.setattr(fold, "intercept", changed)
    with pytest.raises(ModelError, match="attention of layer 2 to read what v_proj makes, got other values"):
        fold.check_path(model, [0, 1, 2], torch.randint(2, 97, (1, 20), generator=rng))


def test_a_checkpoint_of_other_weights_is_refused(rng, tmp_path):
    model = made("llama", torch.float32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] += 1
    maps, before = maps_of(model, rng), {name: p.clone() for name, p in model.named_parameters()}
    where = find_stored(tmp_path, before, "model")
    with pytest.raises(ModelError, match=r"layers.1.self_attn.o_proj.weight as the checkpoint stores it, got other"):
        fold.fold_(model, maps, where)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "nothing has been folded"


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_weights_have_the_dtype_of_the_checkpoint(computed, rng, tmp_path):
    """Also in memory, where the model computes in another."""
    made("llama", torch.float16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=computed)
    names, prefix = fold.check_config(config, [0, 1, 2])
    change = fold.fold_(model, maps_of(model, rng), find_stored(tmp_path, names, prefix))
    parameters = dict(model.named_parameters())
    assert set(change.weights) == set(names)
    for name, weight in change.weights.items():
        assert weight.dtype == torch.float16 and torch.equal(weight.to(computed), parameters[name])
