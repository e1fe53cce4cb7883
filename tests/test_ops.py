"""Ops: schema, fake and dispatch (torch.library.opcheck), and the errors of a named implementation."""

import layer_state
import pytest
import torch

from tq_ao import ops, reference

DIM, WINDOW = 64, 32


def layer(rng: torch.Generator, seen: int = 150) -> tuple[list[torch.Tensor], list, list]:
    """A filled cache, its maps as `append_` takes them and as attention takes them."""
    maps = layer_state.maps(2, DIM, rng)
    state = layer_state.empty_cache(dim=DIM, tokens=256)
    write = [maps.key, maps.key_shift, maps.value, maps.value_shift]
    read = [maps.query, maps.key_shift, maps.output, maps.value_shift]
    k, v = (layer_state.tokens(2, 2, seen, DIM, rng) for _ in range(2))
    ops.append_(*state, k, v, torch.tensor(0), torch.tensor([0, 5]), *write, WINDOW)
    for i in (1, 3):
        state[i].nan_to_num_()
    return state, write, read


def call(name: str, rng: torch.Generator) -> tuple[list, dict]:
    """Arguments of one op."""
    state, write, read = layer(rng)
    place = [torch.tensor(150), torch.tensor([0, 5])]
    x = [layer_state.tokens(2, 2, 40, DIM, rng) for _ in range(2)]
    if name == "encode":
        return [x[0], write[0], write[1], 3, "key"], {}
    if name == "prepare":
        return [write[0], write[1], "key"], {}
    if name == "append_":
        return [*state, *x, *place, *write, WINDOW], {}
    if name == "decode":
        return [state[0], state[1], DIM, "key"], {}
    q_len = 1 if name == "decode_attention" else 40
    q = layer_state.tokens(2, 4, q_len, DIM, rng)
    new = x if name == "extend_attention" else []
    extras = {"softcap": 20.0, "sink_logits": torch.randn(4, generator=rng)}
    return [q, *new, *state, *place, *read, WINDOW, 0.125], extras


NAMES = ["encode", "decode", "append_", "decode_attention", "extend_attention"]
MORE = [("encode", "feedback", "operands"), ("prepare",), ("prepare", "feedback")]
MORE += [("append_", "value_feedback"), ("append_", "key_operands", "value_operands")]


@pytest.mark.parametrize("names", [*((n,) for n in NAMES), *MORE])
def test_opcheck(names: tuple[str, ...], rng: torch.Generator) -> None:
    name, *more = names
    args, kwargs = call(name, rng)
    square = torch.randn(2, DIM // 2, DIM // 2, generator=rng) / DIM
    ahead = ops.prepare(torch.zeros(2, DIM, DIM), torch.zeros(2, DIM), "key", feedback=square)
    kwargs |= {m: square if "feedback" in m else ahead for m in more}
    torch.library.opcheck(getattr(torch.ops.tq_ao, name).default, tuple(args), kwargs)


def test_cpu_tensors_run_the_reference(rng: torch.Generator) -> None:
    args, kwargs = call("extend_attention", rng)
    q, k_new, v_new, *rest = args
    want = reference.attention(q, *rest, kwargs["softcap"], kwargs["sink_logits"], k_new, v_new)
    for impl in ("auto", "reference"):
        assert torch.equal(ops.extend_attention(*args, **kwargs, impl=impl), want)


def test_the_reference_reads_no_operands(rng: torch.Generator) -> None:
    args, _ = call("encode", rng)
    none, some = (ops.encode(*args, operands=operands) for operands in (None, torch.zeros(1)))
    assert all(torch.equal(a, b) for a, b in zip(none, some, strict=True))


@pytest.mark.parametrize("impl", ["triton", "gluon"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "decode"])
def test_a_named_implementation_never_falls_back(name: str, impl: str, rng: torch.Generator) -> None:
    args, kwargs = call(name, rng)
    with pytest.raises(ValueError, match=f"impl='{impl}' does not run on cpu.*reference"):
        getattr(ops, name)(*args, **kwargs, impl=impl)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "decode"])
def test_an_unknown_implementation_lists_the_known_ones(name: str, rng: torch.Generator) -> None:
    args, kwargs = call(name, rng)
    with pytest.raises(ValueError, match=r"expected impl in \('auto', 'gluon', 'triton', 'reference'\), got 'fast'"):
        getattr(ops, name)(*args, **kwargs, impl="fast")


def test_append_mutates_its_buffers_and_only_those(rng: torch.Generator) -> None:
    args, _ = call("append_", rng)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    ops.append_(*args)
    changed = [
        i
        for i, (a, b) in enumerate(zip(args, before, strict=True))
        if isinstance(a, torch.Tensor) and not torch.equal(a, b)
    ]
    assert changed == [0, 1, 2, 3, 6, 7]  # sinks were full already


def test_compiled_append_then_attention_sees_the_new_tokens(rng: torch.Generator) -> None:
    state, write, read = layer(rng)
    start = torch.tensor([0, 5])
    k, v, q = (layer_state.tokens(2, h, 1, DIM, rng) for h in (2, 2, 4))

    def step(length: torch.Tensor) -> torch.Tensor:
        ops.append_(*state, k, v, length, start, *write, WINDOW)
        return ops.decode_attention(q, *state, length + 1, start, *read, WINDOW, 0.125)

    copy = [t.clone() for t in state]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.tensor(150))
    state[:] = copy
    assert torch.equal(compiled, step(torch.tensor(150)))


WRONG = {
    "encode": [
        (0, lambda x: x[..., :40], "head_dim"),
        (1, lambda x: x[:1], r"key map \[2, 64, 64\], got \[1, 64"),
        (4, lambda _: "keys", "role"),
    ],
    "prepare": [(1, lambda x: x[:, :32], "key map"), (1, lambda x: x[0], "key shift"), (2, lambda _: "keys", "role")],
    "decode": [(1, lambda x: x[:, :1], r"scales \[2, 2, .*, 32\], got \[2, 1"), (3, lambda _: "keys", "role")],
    "append_": [
        (8, lambda x: x[:1], r"new keys \[2, 2, 40, 64\], got \[1, 2"),
        (9, lambda x: x[:, :, :30], r"new values \[2, 2, 40, 64\], got \[2, 2, 30"),
        (2, lambda x: x[:, :, :1], "tiles of value codes"),
        (16, lambda window: window + 1, r"a ring of at least window \+ 64 = 97 slots, got 96"),
        (11, lambda x: x[:1], "start"),
        (14, lambda x: x[:, :8], "value map"),
    ],
    "decode_attention": [
        (0, lambda x: x.expand(-1, -1, 5, -1), "one query token per row, got 5; use extend_attention"),
        (0, lambda x: torch.cat([x, x], -1), "head_dim 64, as in the cache"),
        (0, lambda x: x[:, :3], "of 2 rows, a multiple of 2 heads"),
        (0, lambda x: x[:1], r"of 2 rows, a multiple of 2 heads and head_dim 64, as in the cache, got \[1, 4, 1, 64\]"),
        (4, lambda x: x[:, :, :1], "value scales"),
        (6, lambda x: x[:1], "expected sinks of values"),
        (9, lambda x: x[None], r"length \[\], got \[1\]"),
        (10, lambda x: x[:1], r"start \[2\], got \[1\]"),
    ],
    "extend_attention": [
        (
            0,
            lambda x: x[:, :3],
            r"of 2 rows, a multiple of 2 heads and head_dim 64, as in the cache, got \[2, 3, 40, 64\]",
        ),
        (0, lambda x: x[:1], "of 2 rows, a multiple of 2 heads"),
        (1, lambda x: x[:, :, :3], r"new keys \[2, 2, 40, 64\], got \[2, 2, 3, 64\]"),
        (9, lambda x: x[:, :1], "a ring"),
        (12, lambda x: x[:1], r"start \[2\], got \[1\]"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_do_not_fit_are_refused_on_every_device_and_by_fakes(name: str, rng: torch.Generator) -> None:
    args, kwargs = call(name, rng)
    for place, change, message in WRONG[name]:
        wrong = [change(x) if i == place else x for i, x in enumerate(args)]
        with pytest.raises(ValueError, match=message):
            getattr(ops, name)(*wrong, **kwargs)
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in wrong]
        more = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}
        with pytest.raises(ValueError, match=message):
            getattr(ops, name)(*on_meta, **more)


def test_sink_logits_are_one_to_a_query_head(rng: torch.Generator) -> None:
    args, kwargs = call("decode_attention", rng)
    with pytest.raises(ValueError, match=r"sink logits \[4\], got \[2\]"):
        ops.decode_attention(*args, **kwargs | {"sink_logits": torch.zeros(2)})


def test_plain_torch_runs_as_kernels_do_without_gradients_or_autocast(rng: torch.Generator) -> None:
    args, _ = call("append_", rng)
    x = torch.randn(2, 2, 40, DIM, generator=rng, requires_grad=True)
    map = torch.randn(2, DIM, DIM, generator=rng)
    want = ops.encode(x.detach(), map, torch.zeros(2, DIM), 8, "key")
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.encode(x, map, torch.zeros(2, DIM), 8, "key")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    args[8] = x
    ops.append_(*args)
    assert not any(t.requires_grad for t in args[:8])
