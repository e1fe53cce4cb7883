"""Attaching to transformers models, and checkpoints: what loads, with and without tq_ao, and what is refused."""

import copy
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import layer_state
import pytest
import tiny
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    pipeline,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.tokenization_auto import AutoTokenizer

from tq_ao import LayerMaps, TurboQuantCache, TurboQuantConfig, TurboQuantKVCacheConfig, hf, quantize_kv_
from tq_ao.cache import CACHE_NAMES, quantizable_layers
from tq_ao.config import TRANSFORMS_FILE, LayerScheme
from tq_ao.rotation import rotations

SMALL = {"window": 32, "sinks": 3}


def ids_for(rng: torch.Generator, length: int = 120) -> torch.Tensor:
    return torch.randint(2, 97, (1, length), generator=rng)


def tokens(model, ids):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)


def random_maps(rng: torch.Generator, heads: int = 2, dim: int = 32) -> LayerMaps:
    """Well-conditioned maps that are no rotations, with shifts and feedback."""
    r = rotations("dense", heads, dim, 7)
    stretch = torch.rand(heads, dim, generator=rng) + 0.5
    key, value = r * stretch[:, None], r / stretch[:, None]
    shift = torch.randn(2, heads, dim, generator=rng)
    query, output = torch.linalg.inv(key).mT.contiguous(), torch.linalg.inv(value)
    feedback = torch.randn(2, heads, dim // 2, dim // 2, generator=rng) / dim
    return LayerMaps(key, query, value, output, shift[0], shift[1], feedback[0], feedback[1])


def test_save_load_save_is_stable_and_generates_the_same(tmp_path, rng):
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(layers={0: LayerScheme(4, 2)}, **SMALL))
    want = tokens(model, ids)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.turboquant.quantization == model.turboquant.quantization
    assert torch.equal(tokens(again, ids), want)
    again.save_pretrained(tmp_path / "b")
    a, b = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert a == b and a["quantization_config"]["quant_method"] == "turboquant"
    assert "attn_implementation" not in json.dumps(a) and "cache_implementation" not in json.dumps(a)


def test_calibrated_maps_travel_with_the_checkpoint(tmp_path, rng):
    model, ids = tiny.model(), ids_for(rng)
    maps = {i: random_maps(rng) for i in range(3)}
    hf.attach(model, TurboQuantConfig(bits=2, **SMALL), maps)
    want = tokens(model, ids)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for i, layer in again.turboquant.maps.calibrated.items():
        assert layer.tensors().keys() == maps[i].tensors().keys()
        assert all(torch.equal(t, maps[i].tensors()[name]) for name, t in layer.tensors().items())
    bare = {i: LayerMaps(**{**m.tensors(), "key_feedback": None}) for i, m in maps.items()}
    hf.attach(again, again.turboquant.quantization, bare)
    assert not torch.equal(tokens(again, ids), want)  # the cache really is written with it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(tokens(again, ids), want)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / TRANSFORMS_FILE).read_bytes() == (tmp_path / "b" / TRANSFORMS_FILE).read_bytes()


def test_a_checkpoint_of_the_first_version_loads(tmp_path, rng):
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(bits=2, **SMALL))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = config["quantization_config"]["kv_cache_scheme"]["version"] = 1
    path.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tokens(again, ids), tokens(model, ids))


def test_calibrated_maps_are_applied_at_both_ends(rng):
    """With a query map that is not the key map's inverse transpose, even 8 bits breaks."""
    model, ids = tiny.model(), ids_for(rng)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], **{tiny.CACHE: cache})
        exact = model(ids[:, -1:], **{tiny.CACHE: cache}).logits
        error = {}
        for name in ("right", "wrong"):
            maps = {i: random_maps(rng) for i in range(3)}
            if name == "wrong":
                maps = {i: LayerMaps(**{**m.tensors(), "query": m.key}) for i, m in maps.items()}
            hf.attach(model, TurboQuantConfig(bits=8, **SMALL), maps)
            packed = model.turboquant.make_cache()
            model(ids[:, :-1], **{tiny.CACHE: packed})
            logits = model(ids[:, -1:], **{tiny.CACHE: packed}).logits
            error[name] = ((logits - exact).norm() / exact.norm()).item()
    assert error["right"] < 0.1 < error["wrong"], error


def test_without_tq_ao_the_checkpoint_is_the_original_model_with_one_warning(tmp_path, rng):
    model, ids = tiny.model(), ids_for(rng)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    quantize_kv_(model, TurboQuantConfig(bits=1, window=0, sinks=0))
    model.save_pretrained(tmp_path)
    program = f"""
import logging, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging
lines = []
handler = logging.Handler(); handler.emit = lambda record: lines.append(record.getMessage())
hf_logging.get_logger("transformers").addHandler(handler)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert "tq_ao" not in sys.modules
ids = torch.tensor({ids.tolist()})
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
print(out.tolist() == {want.tolist()}, sum("turboquant" in line for line in lines))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"], done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=3), "version 1..2, got 3"),
        (lambda q: q["kv_cache_scheme"].update(version=7), "version 1..2, got 7"),
        (lambda q: q["kv_cache_scheme"].update(codec="polar"), "codec 'mse', got 'polar'"),
        (lambda q: q["kv_cache_scheme"].update(num_layers=4), "3 layers, got one for 4"),
        (lambda q: q["kv_cache_scheme"].update(head_dim=64), "head_dim 32, got one for 64"),
        (lambda q: q["kv_cache_scheme"].update(scale_dtype="float32"), "scale_dtype 'float16', got 'float32'"),
        (lambda q: q["kv_cache_scheme"].update(layers={"0": 3}), "expected kv_cache_scheme layers"),
        (lambda q: q.pop("kv_cache_scheme"), "lacks kv_cache_scheme"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message, tmp_path):
    model = tiny.model()
    quantize_kv_(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transforms_that_are_missing_broken_or_left_behind_are_refused(tmp_path, rng):
    model = tiny.model()
    hf.attach(model, TurboQuantConfig(**SMALL), {0: random_maps(rng)})
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / TRANSFORMS_FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="convert the model again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / TRANSFORMS_FILE).unlink()
    with pytest.raises(OSError, match=f"{TRANSFORMS_FILE} is missing in"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_checkpoint_in_a_subfolder_brings_its_maps(tmp_path, rng):
    model = tiny.model()
    hf.attach(model, TurboQuantConfig(**SMALL), {0: random_maps(rng)})
    model.save_pretrained(tmp_path / "sub")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    assert list(again.turboquant.maps.calibrated) == [0]


def test_maps_of_another_shape_are_refused(rng):
    model, ids = tiny.model(), ids_for(rng)
    hf.attach(model, TurboQuantConfig(**SMALL), {0: random_maps(rng, heads=4)})
    with torch.no_grad(), pytest.raises(ValueError, match="2 KV heads of dim 32"):
        model(ids)


def test_models_that_cannot_be_packed_say_why():
    latent = DeepseekV3Config(num_hidden_layers=2, hidden_size=64)
    for config, message in (
        (latent, "latent attention"),
        *((CONFIG_MAPPING[kind](), f"{kind}: its attention works on K or V itself") for kind in ("diffllama", "doge")),
        (CONFIG_MAPPING["git"](), "git: its attention works on K or V itself"),
        (CONFIG_MAPPING["mllama"](), "mllama_text_model: its attention works on K or V itself"),
        (CONFIG_MAPPING["minimax"](), "minimax: its attention takes a cache class of its own only"),
        *((CONFIG_MAPPING[kind](), "no attention layers .*num_attention_heads") for kind in ("mamba", "rwkv", "xlstm")),
        (CONFIG_MAPPING["falcon_h1"](), "falcon_h1: no full-attention layers to pack; its layers are of type hybrid"),
        (T5Config(), "encoder-decoder"),
        (tiny.config("llama", head_dim=40), "multiple of 32, got 40"),
        (
            tiny.config("gemma3", layer_types=["sliding_attention"] * 4),
            "gemma3_text: no full-attention layers to pack; .*window of 24 tokens, fewer than the 4096 it reads",
        ),
        (tiny.config("phi4_mini", sliding_window=2047), "phi3: no full-attention .*window of 2047 tokens, .* 4096 it"),
        (tiny.config("gemma3", layer_types=["linear_attention"] * 4), "of type linear_attention"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.check_supported(config)
    if "mimo_v2_flash" in CONFIG_MAPPING:  # newer than the oldest transformers we support, as is the next
        with pytest.raises(ValueError, match="keys and values of one head_dim, got 192 and 128"):
            hf.check_supported(CONFIG_MAPPING["mimo_v2_flash"]())
    if "gemma4_text" in CONFIG_MAPPING:
        with pytest.raises(ValueError, match="gemma4_text: expected one head_dim in all layers"):
            hf.check_supported(CONFIG_MAPPING["gemma4_text"]())
        same = {"head_dim": 32, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        several = CONFIG_MAPPING["gemma4_text"](**same)  # KV heads by layer: maps are drawn when keys come
        hf.check_supported(several)
        assert len(TurboQuantCache(several).packed_layers()) == len(quantizable_layers(several)) > 0
    own = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=97))
    with pytest.raises(ValueError, match="bloom: .* an attention of its own"):
        quantize_kv_(own)
    assert not hasattr(own, "turboquant")
    with pytest.raises(ValueError, match=r"names layers \[0\].*those are \[1, 3\]"):
        quantize_kv_(tiny.model("gemma3"), TurboQuantConfig(layers={0: LayerScheme(3, 3)}))


@pytest.mark.parametrize(
    ("kind", "changes", "packed"),
    [
        ("phi4_mini", {"sliding_window": 4096}, [0, 1, 2]),  # the newest of 4096 tokens sees itself and 4095 others
        ("phi4_mini", {"sliding_window": 4095}, []),
        ("phi4_mini", {"sliding_window": None}, [0, 1, 2]),
        ("gemma3", {}, [1, 3]),
        ("gemma3", {"sliding_window": 4096}, [0, 1, 2, 3]),
        ("gemma3", {"sliding_window": 4096, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}, [1, 3]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, [0, 1, 2]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4000, "max_window_layers": 1}, [0]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}}, [0]),
        ("gemma3", {"sliding_window": 4096, "layer_types": ["linear_attention", *["sliding_attention"] * 3]}, []),
    ],
)  # fmt: skip
def test_layers_slide_if_a_text_can_outgrow_their_window(kind, changes, packed):
    config = tiny.config(kind, **{name: value for name, value in changes.items() if name != "layer_types"})
    config.layer_types = changes.get("layer_types", getattr(config, "layer_types", None))
    assert quantizable_layers(config) == packed


class Wrapper(torch.nn.Module):
    """Hands on what it does not have, as PEFT does."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper])
def test_a_wrapped_model_is_refused(wrap):
    model = tiny.model()
    with pytest.raises(ValueError, match="attach before wrapping it, or pass what it wraps: model.get_base_model"):
        quantize_kv_(wrap(model))
    assert not hasattr(model, "turboquant")


@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_model_that_makes_its_cache_before_its_decoder(part, rng):
    """SmolVLM does, and Idefics 2 and 3."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["smolvlm"](text_config=tiny.config("llama").to_dict(), vision_config=vision)
    model, ids = AutoModelForImageTextToText.from_config(config).eval(), ids_for(rng)
    model = quantize_kv_(model.base_model if part == "base" else model, TurboQuantConfig(**SMALL))
    quantize_kv_(model, TurboQuantConfig(bits=2, **SMALL))
    assert len(model.base_model._forward_pre_hooks) == len(model.get_decoder()._forward_pre_hooks) == 1
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask)[tiny.CACHE]
        assert isinstance(cache, TurboQuantCache) and cache.packed_layers()[0].start.tolist() == [9]
        assert cache.packed_layers()[0].scheme == LayerScheme(2, 2)
        assert model(ids, use_cache=False).get(tiny.CACHE) is None
    assert isinstance(model(ids)[tiny.CACHE], DynamicCache), "gradients are enabled"


def test_what_a_model_calls_its_decoder_need_not_be_one(rng):
    """ModernBERT-decoder's maps hidden states to logits."""
    fields = tiny.config("llama").to_dict() | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "pad_token_id", "layer_types")
    config = CONFIG_MAPPING["modernbert-decoder"](
        **{name: fields[name] for name in names}, num_hidden_layers=4, local_attention=24, eos_token_id=None
    )
    config.num_attention_heads = 2
    model, ids = AutoModelForCausalLM.from_config(config).eval(), ids_for(rng)
    want = tokens(model, ids)
    quantize_kv_(model, TurboQuantConfig(bits=1, window=256))
    assert torch.equal(tokens(model, ids), want)
    with torch.no_grad():
        assert len(model(ids)[tiny.CACHE].packed_layers()) == 2


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a newer transformers")
@pytest.mark.parametrize("asked", [1, 3, 0])
def test_layers_that_share_keys_and_values_may_cut_their_queries(asked, rng):
    """Gemma-4 computes these layers for the tokens whose logits are wanted only, in a second turn as in the first."""
    fields = tiny.config("gemma3").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = CONFIG_MAPPING["gemma4_text"](
        **{name: fields[name] for name in (*names, "sliding_window", "pad_token_id")},
        global_head_dim=32, num_hidden_layers=6, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=97, layer_types=["sliding_attention", "full_attention"] * 3, eos_token_id=None,
    )  # fmt: skip
    model, ids = AutoModelForCausalLM.from_config(config).eval(), ids_for(rng)
    logits = {}
    for name, length in (("exact", None), ("packed", None), ("static", 256)):
        if name == "packed":
            quantize_kv_(model, TurboQuantConfig(bits=1, window=256))
        cache = DynamicCache(config=config) if name == "exact" else model.turboquant.make_cache(length)
        with torch.no_grad():
            turns = [model(part, **{tiny.CACHE: cache}, logits_to_keep=asked).logits for part in ids.split(60, 1)]
        logits[name] = torch.cat(turns, 1)
    assert logits["exact"].shape[1] == (2 * asked or 120)
    for name in ("packed", "static"):
        torch.testing.assert_close(logits[name], logits["exact"], atol=1e-5, rtol=1e-4)


def test_attaching_again_changes_the_schedule_only(rng):
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(bits=2, **SMALL))
    quantize_kv_(model, TurboQuantConfig(bits=4, **SMALL))
    assert len(model.model._forward_pre_hooks) == 1
    with torch.no_grad():
        cache = model(ids)[tiny.CACHE]
    assert cache.packed_layers()[0].scheme == LayerScheme(4, 4)


def test_plain_call_and_training(rng):
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    with torch.no_grad():
        assert isinstance(model(ids)[tiny.CACHE], TurboQuantCache)
        assert getattr(model(ids, use_cache=False), tiny.CACHE) is None
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def prepared(model, mode, asked, **device):
    """The cache that `generate` would get for 200 tokens."""
    given = {}
    on = SimpleNamespace(**{"device": model.device, "dtype": model.dtype, "turboquant": model.turboquant, **device})
    hf._prepare_cache_for_generation(on, GenerationConfig(use_cache=True, **asked), given, mode, 1, 200)
    return given[tiny.CACHE]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_on_a_gpu_guesses_go_through_a_cache_that_can_take_them_back(kind):
    """Static there by default, but guesses reach beyond its end, and static sliding layers refuse to be cropped."""
    model, cuda = tiny.model(kind), torch.device("cuda")
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    guesses = {"prompt_lookup_num_tokens": 4}
    cache = prepared(model, GenerationMode.ASSISTED_GENERATION, guesses, device=cuda)
    assert cache.is_croppable and not cache.is_compileable
    assert prepared(model, GenerationMode.GREEDY_SEARCH, {}, device=cuda).is_compileable


@pytest.mark.parametrize("implementation", [None, "static"])
def test_guesses_near_the_last_token(implementation):
    """Prompt lookup proposes as many tokens as it is told, whatever is left of max_length."""
    model = tiny.model()
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    ids = torch.arange(2, 22).repeat(1, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_length": 257, "do_sample": False}
    want = model.generate(ids, **options)
    try:
        found = model.generate(ids, **options, prompt_lookup_num_tokens=20, cache_implementation=implementation)
    except ValueError as error:
        if "not supported with Static cache" not in str(error):
            raise
        pytest.skip("this transformers takes no guesses back from a static cache")
    assert found.shape == want.shape


def test_the_last_static_cache_serves_again_if_it_fits():
    model, greedy = tiny.model(), GenerationMode.GREEDY_SEARCH
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    where = id(prepared(model, greedy, {"cache_implementation": "static"}))
    assert id(prepared(model, greedy, {"cache_implementation": "static"})) == where
    model.bfloat16()
    other = prepared(model, greedy, {"cache_implementation": "static"})
    assert id(other) != where, "its buffers are of another dtype"
    assert other.get_max_length() == 256
    roomy = prepared(model, greedy, {"cache_implementation": "static", "max_cache_len": 1000})
    assert roomy.get_max_length() == 1024


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_caches_made_under_inference_mode_serve_outside_it(kind, rng):
    model, ids = quantize_kv_(tiny.model(kind), TurboQuantConfig(bits=8, **SMALL)), ids_for(rng)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    with torch.inference_mode():
        growing = model(ids)[tiny.CACHE]
        model.generate(ids, **options, cache_implementation="static")
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), want)
    with torch.no_grad():
        growing.batch_repeat_interleave(2)
        for at in (-8, -7):
            step = model(want[:, at : at + 1].expand(2, 1), **{tiny.CACHE: growing}).logits
            assert torch.equal(step[:, -1].argmax(-1), want[0, at + 1].expand(2))
    if kind == "llama":
        growing.crop(-2)


def test_loaded_weights_are_not_quantised(tmp_path, rng):
    """transformers refuses float, half and Trainer to models whose weights are."""
    quantize_kv_(tiny.model(), TurboQuantConfig(**SMALL)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32
    assert not model.is_quantized and tokens(model, ids_for(rng)).shape == (1, 150)


def test_attaching_under_another_default_dtype(rng):
    model, ids = tiny.model(), ids_for(rng)
    config = TurboQuantConfig(seed=int(torch.randint(1 << 20, (), generator=rng)), **SMALL)
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantize_kv_(model, config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(tokens(model, ids), tokens(quantize_kv_(model, config), ids))


def test_a_pickle_has_no_random_maps_but_draws_them_again(rng):
    model = quantize_kv_(tiny.model(), TurboQuantConfig(**SMALL))
    tokens(model, ids_for(rng))
    plain = len(pickle.dumps(tiny.model()))
    packed = pickle.dumps(model)
    assert len(packed) < plain + 20_000  # a layer's maps are 2 heads of 32 x 32 numbers, three times
    again = pickle.loads(packed).turboquant
    assert [*again.maps._drawn] == [*model.turboquant.maps._drawn] != []


def test_attention_weights_are_none_and_that_is_said(rng, caplog):
    model = quantize_kv_(tiny.model(), TurboQuantConfig(**SMALL))
    hf.logger.warning_once.cache_clear()
    with torch.no_grad():
        assert not model(ids_for(rng), output_attentions=True).attentions
    assert "keeps no weights" in caplog.text


@pytest.mark.parametrize(("kind", "window"), [("llama", 0), ("gemma3", 24), ("gemma3", 256), ("gemma3", 400)])
def test_a_chat_goes_on_beyond_the_static_cache_of_its_last_turn(kind, window, rng):
    """A window of 400 makes sliding layers that have to grow, too; one of 256 is as long as the first static cache."""
    model = tiny.model(kind, **({"sliding_window": window} if window else {}))
    quantize_kv_(model, TurboQuantConfig(k_bits=4, v_bits=8, **SMALL))
    turns, caches = [ids_for(rng, n) for n in (200, 90, 130)], {}
    for implementation in ("static", "dynamic"):
        text, cache = turns[0][:, :0], None
        for turn in turns:
            text = torch.cat([text, turn], 1)
            options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 20, "do_sample": False}
            options |= {"cache_implementation": implementation} if cache is None else {tiny.CACHE: cache}
            out = model.generate(text, **options, return_dict_in_generate=True)
            text, cache = out.sequences, out[tiny.CACHE]
        caches[implementation] = text, cache
    assert torch.equal(caches["static"][0], caches["dynamic"][0])
    static = caches["static"][1]
    assert static.is_compileable and static.get_max_length() >= text.shape[1]
    assert static.is_croppable == model.turboquant.make_cache(static.get_max_length()).is_croppable
    grown, plain = (cache.packed_layers()[0] for _, cache in caches.values())
    tiles = (text.shape[1] - 1 - 32 - 3) // 32
    assert torch.equal(grown.k_codes[:, :, :tiles], plain.k_codes[:, :, :tiles])


def test_a_static_cache_of_layers_that_cannot_be_made_longer_says_so():
    cache = quantize_kv_(tiny.model("gemma3"), TurboQuantConfig(**SMALL)).turboquant.make_cache(16)
    cache.layers[2] = type("Other", (type(cache.layers[2]),), {})(16, 24)
    cache.make_room(10)
    assert cache.get_max_length() == 16
    with pytest.raises(ValueError, match="at most 16 tokens in a static cache with layers of type Other, got 17"):
        cache.make_room(17)
    assert {layer.max_cache_len for layer in cache.layers} == {16}, "as it was"


def test_a_checkpoint_loaded_before_the_import_is_quantised_in_place(tmp_path, rng):
    """transformers leaves a dict of a method that it does not know."""
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(bits=2, **SMALL)).save_pretrained(tmp_path)
    want = tokens(quantize_kv_(model, TurboQuantConfig(bits=1, **SMALL)), ids)
    program = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert isinstance(model.config.quantization_config, dict)
from tq_ao import TurboQuantConfig, quantize_kv_
assert quantize_kv_(model).turboquant.quantization.layers[0].k_bits == 2  # the checkpoint's own
quantize_kv_(model, TurboQuantConfig(bits=1, window=32, sinks=3))
ids = torch.tensor({ids.tolist()})
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
model.save_pretrained({str(tmp_path / "again")!r})
print(out.tolist() == {want.tolist()})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"], done.stderr
    scheme = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme["num_bits"] == 1


def test_quantising_a_converted_model_keeps_its_schedule_and_maps(rng, monkeypatch):
    model, said = tiny.model(), []
    monkeypatch.setattr(hf.logger, "warning", lambda text, *_: said.append(text))
    maps = {i: layer_state.maps(2, 32, rng) for i in range(3)}
    hf.attach(model, TurboQuantConfig(bits=2, **SMALL), maps)
    before = model.turboquant
    assert quantize_kv_(model).turboquant is before and not said
    quantize_kv_(model, TurboQuantConfig(bits=4, **SMALL))
    assert model.turboquant.maps.calibrated == {} and len(said) == 1 and "calibrated maps are replaced" in said[0]


def test_both_configs_are_taken_and_nothing_else(rng):
    model = tiny.model()
    quantize_kv_(model, TurboQuantKVCacheConfig(k_bits=4, v_bits=2))
    assert model.turboquant.quantization.layers[0] == LayerScheme(4, 2)
    for config, name in ((3, "int"), ({"bits": 3}, "dict")):
        with pytest.raises(ValueError, match=rf"expected a TurboQuantConfig, got {name}; write quantize_kv_\(model,"):
            quantize_kv_(tiny.model(), config)
    with pytest.raises(ValueError, match="expected a transformers model, got str"):
        quantize_kv_("a-folder", TurboQuantConfig())
    with pytest.raises(ValueError, match="window of fewer than the 4096 tokens that this model reads, got 4096"):
        quantize_kv_(tiny.model(), TurboQuantConfig(window=4096))


@pytest.mark.parametrize(("asked", "warned"), [("eager", True), ("sdpa", False), (None, False)])
def test_an_attention_that_was_asked_for_gives_way_aloud(asked, warned, monkeypatch):
    said = []
    monkeypatch.setattr(hf.logger, "warning", lambda text, *args: said.append(text % args))
    model = AutoModelForCausalLM.from_config(tiny.config("llama"), attn_implementation=asked)
    quantize_kv_(quantize_kv_(model, TurboQuantConfig(**SMALL)), TurboQuantConfig(**SMALL))
    assert said == ["attn_implementation='eager' gives way to the attention that reads packed keys and values; prompts "
                    "use SDPA"] * warned  # fmt: skip


def test_weights_on_the_meta_device_have_no_bias_to_look_at():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.config("qwen2"))
    assert hasattr(quantize_kv_(model), "turboquant")


def test_devices_without_kernels_are_refused():
    model = tiny.model()
    layer = quantize_kv_(model, TurboQuantConfig(**SMALL)).turboquant.make_cache().layers[0]
    elsewhere = SimpleNamespace(device=torch.device("mps"), shape=(1, 2, 3, 32))
    with pytest.raises(ValueError, match="expected a device of type cpu or cuda, got mps"):
        layer.lazy_initialization(elsewhere, elsewhere)


def test_a_large_key_bias_is_warned_of_unless_maps_subtract_it(rng, monkeypatch):
    model, said = tiny.model("qwen2"), []
    monkeypatch.setattr(hf.logger, "warning", lambda text, *values: said.append(text % values))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.zero_()[0] = 30.0
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    hf.attach(model, TurboQuantConfig(**SMALL), {1: random_maps(rng)})
    hf.attach(model, TurboQuantConfig(layers={1: LayerScheme(16, 16)}, **SMALL))
    assert not said
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[0] = 3000.0
    hf.attach(model, TurboQuantConfig(**SMALL), {1: random_maps(rng)})
    hf.attach(model, TurboQuantConfig(layers={1: LayerScheme(16, 16)}, **SMALL))
    assert not said
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    assert len(said) == 1 and "(layer 1)" in said[0] and "Convert the model" in said[0]


def test_copies_and_pickles_are_models_of_their_own(tmp_path, rng):
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(bits=2, **SMALL))
    want = tokens(model, ids)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(tokens(other, ids), want)
        quantize_kv_(other, TurboQuantConfig(bits=8, **SMALL))
        with torch.no_grad():
            widths = [one(ids)[tiny.CACHE].packed_layers()[0].scheme.k_bits for one in (other, model)]
        assert widths == [8, 2]
        other.save_pretrained(tmp_path / "saved")
        stored = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert stored["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_a_call_with_gradients_says_that_its_cache_is_exact(rng, monkeypatch):
    model, said = tiny.model(), []
    monkeypatch.setattr(hf.logger, "warning_once", said.append)
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    assert isinstance(model(ids_for(rng))[tiny.CACHE], DynamicCache)
    assert len(said) == 1 and "torch.no_grad()" in said[0]
    model(ids_for(rng), use_cache=False)
    with torch.no_grad():
        model(ids_for(rng))
    model.train()(ids_for(rng))
    assert len(said) == 1


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_decoder_gets_its_cache_whatever_the_caller_calls_it(name, rng):
    """A forward takes a name it does not know for one more keyword: the cache would go unread, and unnoticed."""
    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    cache = model.turboquant.make_cache()
    with torch.no_grad():
        assert model.model(ids, **{name: cache})[tiny.CACHE] is cache
        assert cache.get_seq_length() == ids.shape[1]
        assert isinstance(model.model(ids, **{name: None})[tiny.CACHE], TurboQuantCache)
        with pytest.raises(ValueError, match="one cache, got both"):
            model.model(ids, **dict.fromkeys(CACHE_NAMES, cache))


def test_code_with_the_old_name_of_the_cache(rng):
    """Models from the Hub keep it when transformers renames its own."""

    class OldDecoder(LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
            return super().forward(input_ids, attention_mask, **{tiny.CACHE: past_key_values}, **kwargs)

    class OldModel(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
            given = {"past_key_values": past_key_values} if past_key_values is not None else {}
            hidden = self.model(input_ids, attention_mask, **given, **kwargs)
            return CausalLMOutputWithPast(
                logits=self.lm_head(hidden.last_hidden_state), **{tiny.CACHE: hidden[tiny.CACHE]}
            )

    model, ids = tiny.model(), ids_for(rng)
    quantize_kv_(model, TurboQuantConfig(**SMALL))
    old = OldModel(model.config).eval()
    old.model = OldDecoder(model.config).eval()
    old.load_state_dict(model.state_dict())
    quantize_kv_(old, TurboQuantConfig(**SMALL))
    with torch.no_grad():
        cache = old.turboquant.make_cache()
        assert old(ids, past_key_values=cache)[tiny.CACHE] is cache and cache.get_seq_length() == ids.shape[1]
        assert isinstance(old(ids)[tiny.CACHE], TurboQuantCache)
    assert torch.equal(tokens(old, ids), tokens(model, ids))


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_forward_that_takes_no_cache_is_refused(part):
    class Decoder(LlamaModel):
        def forward(self, input_ids=None, state=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    class Model(LlamaForCausalLM):
        def forward(self, input_ids=None, state=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    config = tiny.config("llama")
    model = Model(config) if part == "model" else tiny.model()
    if part == "decoder":
        model.model = Decoder(config)
    with pytest.raises(ValueError, match=f"takes the KV cache as '{tiny.CACHE}', got .*state"):
        quantize_kv_(model)
    assert not hasattr(model, "turboquant") and not model.model._forward_pre_hooks


def test_text_generation_pipeline(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    quantize_kv_(model, TurboQuantConfig(bits=4, window=16, sinks=4))
    run = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(smollm2))
    prompt = (
        "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. " * 4
        + "The capital of Italy is"
    )
    assert "Rome" in run(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]


def test_torchao_checkpoints_load_as_they_do_without_us(tmp_path, rng):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    weights = TorchAoConfig(quant_type=Int8WeightOnlyConfig(version=2))
    tiny.model().save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=weights).save_pretrained(
        tmp_path / "ao"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ao", quantization_config=weights)
    assert not hasattr(model, "turboquant")
    assert model(ids_for(rng)).logits.isfinite().all()


def test_torchao_weights_and_a_packed_cache_in_one_checkpoint(tmp_path, rng):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    tiny.model(hidden_size=128).save_pretrained(tmp_path / "base")
    weights = TorchAoConfig(quant_type=Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=weights, dtype=torch.float32)
    quantize_kv_(model, TurboQuantConfig(bits=4, **SMALL))
    ids = ids_for(rng)
    want = tokens(model, ids)
    model.save_pretrained(tmp_path / "both")
    stored = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "torchao" and stored["kv_cache_scheme"]["num_bits"] == 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32)
    assert again.turboquant.quantization == model.turboquant.quantization
    assert torch.equal(tokens(again, ids), want)


def test_a_schedule_with_transforms_needs_its_maps():
    with pytest.raises(ValueError, match="no maps came with it"):
        hf.attach(tiny.model(), TurboQuantConfig(transforms=TRANSFORMS_FILE))


@pytest.mark.parametrize(
    "calls",
    [
        [{}, {}],
        [{}, {"rows": 2}, {}],
        [{}, {"num_return_sequences": 3}, {}],
    ],
    ids=["prompts", "rows", "sequences"],
)
def test_a_static_cache_of_an_earlier_call_changes_nothing(calls, rng, seed):
    model = quantize_kv_(tiny.model(), TurboQuantConfig(**SMALL))
    for changes in calls:
        options = {"max_new_tokens": 8, "do_sample": True, "cache_implementation": "static", **changes}
        ids = torch.randint(2, 97, (options.pop("rows", 1), 40), generator=rng)
        runs = []
        for one in (model, copy.deepcopy(model)):  # a copy goes without the last cache
            torch.manual_seed(seed)
            runs.append(one.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert torch.equal(*runs)


def test_generate_without_a_cache_makes_none(rng):
    model, ids = tiny.model(), ids_for(rng, 20)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "use_cache": False}
    want = model.generate(ids, **options)
    quantize_kv_(model, TurboQuantConfig(bits=1, window=0, sinks=0))
    found = model.generate(ids, **options, return_dict_in_generate=True)
    assert found.get(tiny.CACHE) is None and torch.equal(found.sequences, want)
