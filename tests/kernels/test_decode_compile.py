"""Decode kernels compiled to cubins without a GPU, and what their machine code must look like.

The Gluon kernel's speed is a count of instructions: spills, a scalar table look-up or a transpose through shared memory
would show here first.  Compilation runs in child processes, where Triton is not interpreting.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {
    "rotated": "*fp32", "bias": "*fp32", "claims": "*i32", "k_codes": "*i8", "v_codes": "*i8", "k_scales": "*fp16",
    "v_scales": "*fp16", "q": "*bf16", "q_exact": "*bf16", "k_sinks": "*bf16", "v_sinks": "*bf16", "k_recent": "*bf16",
    "v_recent": "*bf16", "k_new": "*bf16", "v_new": "*bf16", "length": "*i64",
    "start": "*i64", "split_ml": "*fp32", "exact_ml": "*fp32",
    "query_map": "*fp32", "key_shift": "*fp32", "output_map": "*fp32", "value_shift": "*fp32", "sink_logits": "*fp32",
    "out": "*bf16",
    "factor": "fp32", "cap": "fp32", "inverse_unit": "fp32",
}  # fmt: skip


def _signature(names: list[str], constants: dict, words: str, partial: str = "*fp32") -> tuple[dict, dict]:
    types = POINTERS | {"k_codes": words, "v_codes": words, "split_o": partial, "exact_o": partial}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.startswith("stride_")]
    return signature, {(i,): [["tt.divisibility", 16]] for i in aligned}


def _partial(case: dict) -> str:
    """The type of partial outputs, as decode_attention allocates them for a 16-bit window unless the case says more."""
    return case.get("partial") or ("*fp16" if case["head_dim"] > 64 else "*fp32")


def _compile(case: dict):
    """Compile one kernel as decode_attention launches it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tq_ao.kernels import decode_attention as host

    dim, group = case["head_dim"], case["group"]
    padded = triton.next_power_of_2(dim)
    amd = isinstance(case["arch"], str)
    target = GPUTarget("hip" if amd else "cuda", case["arch"], 64 if case["arch"] == "gfx942" else 32)
    softcap = case.get("softcap", False)
    if case["kernel"] == "gluon":
        from triton.experimental.gluon._runtime import GluonASTSource

        from tq_ao.kernels.decode_gluon import gluon_splits_kernel as fn
        from tq_ao.kernels.fragments import constraints, key_asm, value_asm

        k_bits, v_bits = case["bits"]
        tile_bytes = 4 * dim * (k_bits + v_bits) + 128
        config = host.configure(
            dim, -(-group // 8), tile_bytes, row_tiles=case.get("tiles", 1000), work=case.get("work", 0),
            shared={80: 164, 89: 100}.get(case["arch"], 228),
        )  # fmt: skip
        constants = {
            "G": group, "D": dim, "K_BITS": k_bits, "V_BITS": v_bits, "HT": config.head_tiles, "TILES": config.tiles,
            "SOFTCAP": softcap, "FEW": case.get("few", False), "PDL": case["arch"] >= 90,
            "K_ASM": key_asm(k_bits), "K_CONSTRAINTS": constraints(8, k_bits), "V_ASM": value_asm(v_bits),
            "V_CONSTRAINTS": constraints(16, v_bits), "num_warps": 1,
        }  # fmt: skip
        signature, attrs = _signature(fn.arg_names, constants, "*i8", _partial(case))
        source = GluonASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
        return triton.compile(source, target=target, options={"num_warps": 1, "maxnreg": config.registers}), config
    if case["kernel"] == "merge":
        from triton.experimental.gluon._runtime import GluonASTSource

        from tq_ao.kernels.combine_gluon import combine_gluon_kernel as fn

        merge = host.merge_config(dim, case["rows"], case["splits"], 132)
        warps = merge.queries * merge.dim_warps
        constants = {
            "G": group, "D": dim, "DP": padded, "COLUMNS": merge.columns, "R": merge.queries, "WD": merge.dim_warps,
            "PARTS": merge.parts, "MORE": case["splits"] > merge.parts, "HAS_SINK": True,
            "E_PARTS": min(8, triton.next_power_of_2(case["chunks"])), "E_MORE": case["chunks"] > 8,
            "FEW": case.get("few", False), "PDL": case["arch"] >= 90, "num_warps": warps, "batch": 1,
        }  # fmt: skip
        signature, attrs = _signature(fn.arg_names, constants, "*i8", _partial(case))
        signature |= {"split_ml": "*i64", "exact_ml": "*i64"}
        source = GluonASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
        return triton.compile(source, target=target, options={"num_warps": warps}), None
    if case["kernel"] == "portable":
        from tq_ao.kernels.decode_portable import portable_splits_kernel as fn

        k_bits, v_bits = case["bits"]
        constants = {"G": group, "D": dim, "DP": padded, "K_BITS": k_bits, "V_BITS": v_bits, "SOFTCAP": softcap}
    elif case["kernel"] == "query":
        from tq_ao.kernels import query

        fn = query.prepare_few_kernel if case.get("few") else query.prepare_kernel
        constants = {
            "G": group, "D": dim, "DP": padded, "COLUMNS": case.get("columns", 32), "OPERAND": triton.language.bfloat16,
            "SOFTCAP": softcap, "PRECISION": "ieee" if amd else "tf32",
            "PDL": case.get("gluon", False) and case["arch"] >= 90,
        }  # fmt: skip
        if case.get("few"):
            constants["NEW"] = case["new"]
        else:
            constants |= {"EXACT": not case.get("gluon"), "CHUNK": 32 if amd else 64}
    else:
        from tq_ao.kernels.combine import combine_kernel as fn

        constants = {
            "G": group, "D": dim, "DP": padded, "COLUMNS": 32, "R": 4, "PARTS": 8, "MORE": True, "HAS_SINK": True,
        }  # fmt: skip
    signature, attrs = _signature(fn.arg_names, constants, "*i32" if case["kernel"] == "portable" else "*i8")
    signature |= {"q": case["q"]} if "q" in case else {}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": 4 if case.get("gluon") else 8, "num_stages": 1}
    return triton.compile(source, target=target, options=options), None


def _opcodes(sass: str) -> tuple[list[str], list[list[str]]]:
    """All opcodes, and those of every loop, from the target of a backward branch to the branch."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\S+)(.*);", line)
        if instruction:
            opcodes.append(instruction[1].split(".")[0])
            branch = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if opcodes[-1] == "BRA" and branch and branch[1] in labels:
                loops.append(opcodes[labels[branch[1]] :])
    return opcodes, loops


def _report(case: dict) -> dict:
    """Compile and disassemble one case."""
    import triton

    compiled, config = _compile(case)
    if isinstance(case["arch"], str):
        return {"code": len(compiled.asm["hsaco"])}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    # The loop over full steps: integer matrix products beside copies of what follows, which the last step has not.
    opcodes, loops = _opcodes(sass)
    steps = [loop for loop in loops if {"IMMA", "LDGSTS"} <= set(loop)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loop": Counter(steps[0]) if steps else {},
        "all": Counter(opcodes),
        "order": [opcodes.index(op) if op in opcodes else -1 for op in ("ACQBULK", "PREEXIT", "LDG")],
        "config": config._asdict() if config else None,
    }


@lru_cache
def _reports() -> dict[str, dict]:
    """Reports of all cases of this file, from two child processes that do not interpret Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    cases = [*GLUON.values(), *MERGES.values(), *PORTABLE, *OTHERS, *AMD]
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, json.dumps(cases[i::2])],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    found = {}
    for i, child in enumerate(children):
        stdout, stderr = child.communicate(timeout=900)
        assert child.returncode == 0, stderr[-4000:]
        found |= dict(zip(map(json.dumps, cases[i::2]), json.loads(stdout.splitlines()[-1]), strict=True))
    return found


def report(case: dict) -> dict:
    return _reports()[json.dumps(case)]


def gluon(arch: int = 90, bits: tuple[int, int] = (3, 3), head_dim: int = 128, group: int = 4, **more: int) -> dict:
    return {"kernel": "gluon", "arch": arch, "bits": bits, "head_dim": head_dim, "group": group, **more}


GLUON = {
    **{f"{k} and {v} bits": gluon(bits=(k, v)) for k, v in ((1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (4, 2))},
    "short rows": gluon(tiles=64, tiles_each=1),
    "head_dim 64": gluon(head_dim=64),
    "head_dim 96": gluon(head_dim=96),
    "head_dim 96, short rows": gluon(head_dim=96, tiles=64, tiles_each=1),
    "head_dim 256": gluon(head_dim=256, group=8),
    "16 heads": gluon(group=16),
    **{
        f"16 heads, long rows, {k} and {v} bits": gluon(
            group=16, work=1000, bits=(k, v), tiles_each=2 if k + v > 4 else 1
        )
        for k, v in ((2, 2), (2, 3), (3, 3), (4, 4))
    },
    "16 heads of 64, long rows, 1 bit": gluon(group=16, work=1000, head_dim=64, bits=(1, 1), tiles_each=2),
    "16 heads of 256": gluon(group=16, head_dim=256),
    "soft-cap": gluon(softcap=True),
    "head_dim 32": gluon(head_dim=32),
    "24 heads": gluon(group=24),
    **{f"a few queries, {n} rows": gluon(group=n, few=True) for n in (8, 16, 48)},
    "a few queries, long rows": gluon(group=48, few=True, work=1000, tiles_each=2),
    "a few queries, head_dim 64": gluon(group=16, few=True, head_dim=64),
    "a few queries, head_dim 256": gluon(group=16, few=True, head_dim=256),
    "a few queries, sm_80": gluon(arch=80, group=16, few=True),
    "sm_80": gluon(arch=80),
    "sm_89": gluon(arch=89),
    "sm_100": gluon(arch=100),
}


@pytest.mark.parametrize("name", GLUON)
def test_gluon(name: str) -> None:
    case = GLUON[name]
    got = report(case)
    config, loop, dim = got["config"], Counter(got["loop"]), case["head_dim"]
    assert (got["order"][0] >= 0) == (case["arch"] >= 90), "it waits for the queries"
    assert loop["ATOMG"] == 1, "a step is claimed at a time"
    assert loop["STL"] == 0, "the loop spills"
    assert loop["LDL"] <= 4, "the loop may re-read a few constants, of about 900 instructions"
    assert got["spills"] <= 128, "the exact tokens, once per program, may keep some values in local memory"
    assert got["registers"] <= config["registers"]
    assert config["tiles"] == case.get("tiles_each", config["tiles"])
    k_bits, v_bits = case["bits"]
    tile = 4 * dim * (k_bits + v_bits) + 128  # codes and scales
    exact = 2 * 2 * (32 if dim <= 128 else 16) * dim  # keys and values of so many tokens
    assert got["shared"] <= max(2 * config["tiles"] * tile, exact) + 1024, (
        "shared memory holds first exact tokens, then the ring in their place"
    )
    # An operand register is one AND, 8 for 32 keys, 16 for 32 values; two more put the fourth word of 3 bits together.
    groups = config["tiles"] * dim // 32
    masks = groups * (8 * (k_bits < 8) + 16 * (v_bits < 8) + 2 * (k_bits == 3) + 2 * (v_bits == 3))
    assert masks <= loop["LOP3"] <= masks + 16 + 8 * groups * (v_bits == 8)
    assert loop["PRMT"] <= 8 + 16 * groups * (v_bits == 8), "only 8-bit values, which become fp16, are permuted"
    assert loop["F2FP"] <= 8 * config["tiles"] * config["head_tiles"], "probabilities are converted, values are not"
    words = config["tiles"] * (k_bits + v_bits) * dim // 32  # read by each lane
    assert loop["LDS"] + loop["LDSM"] <= words // min(4, dim // 32 & -(dim // 32)) + 4 * config["tiles"]
    if (case["arch"], k_bits, v_bits, dim, case["group"], len(case)) == (90, 3, 3, 128, 4, 5):
        assert loop.total() <= 12 * 32 * config["tiles"], "a step of 64 tokens takes 740 instructions"


def merge(
    head_dim: int, rows: int, splits: int, arch: int = 90, chunks: int = 6, partial: str = "", few: bool = False
) -> dict:
    """`rows` are the queries of all rows and heads; partial: a type of partial outputs other than head_dim's own."""
    case = {"kernel": "merge", "arch": arch, "head_dim": head_dim, "group": 16 if few else 4, "few": few}
    return case | {"rows": rows, "splits": splits, "chunks": chunks, "partial": partial}


MERGES = {
    "many rows": merge(128, 1024, 6, chunks=3),
    "very many rows": merge(128, 4096, 6, chunks=3),
    "few rows, many splits": merge(128, 32, 128),
    "more splits than at once": merge(128, 288, 44),
    "splits merged at once": merge(128, 256, 24),
    "splits merged at once, a window that is not 16-bit": merge(128, 256, 24, partial="*fp32"),
    "head_dim 32": merge(32, 32, 128),
    "head_dim 32, very many rows": merge(32, 20_000, 2, 80),
    "head_dim 64": merge(64, 8, 100, 100),
    "head_dim 96": merge(96, 512, 12, 80),
    "head_dim 96, very many rows": merge(96, 4096, 6, chunks=3),
    "head_dim 256": merge(256, 256, 15),
    "a few queries": merge(128, 8 * 8 * 16, 24, few=True),
    "a few queries, head_dim 256": merge(256, 8 * 16, 24, few=True),
    "a wide window": merge(128, 64, 24, chunks=33),
    "a window that is not 16-bit": merge(128, 64, 24, partial="*fp32"),
}
PORTABLE = [
    {"kernel": "portable", "arch": 80, "bits": bits, "head_dim": head_dim, "group": 4}
    for bits in ((3, 3), (4, 8))
    for head_dim in (96, 128)
]
OTHERS = [
    {"kernel": kernel, "arch": 80, "head_dim": head_dim, "group": 4}
    for kernel in ("query", "combine")
    for head_dim in (64, 128)
]
OTHERS += [
    {"kernel": "query", "arch": arch, "head_dim": dim, "group": 4, "gluon": True}  # before the Gluon kernel
    for arch, dim in ((89, 128), (90, 64), (90, 128), (90, 256), (100, 128))
]
OTHERS += [
    {"kernel": "query", "arch": 90, "head_dim": dim, "group": 8, "gluon": True, "columns": 16384 // dim}  # many rows
    for dim in (128, 256)
]
OTHERS += [
    {"kernel": "query", "arch": arch, "head_dim": dim, "group": g, "gluon": True, "few": True, "new": new}
    for arch, dim, g, new in (
        (80, 128, 16, 16),
        (90, 64, 48, 64),
        (90, 128, 16, 16),
        (90, 128, 48, 64),
        (90, 256, 32, 32),
    )
]


# The portable path, on chips without tf32 products.
AMD = [
    {"kernel": "query", "arch": arch, "head_dim": 128, "group": 4, "q": q}
    for arch in ("gfx942", "gfx1100")
    for q in ("*bf16", "*fp32")
]
AMD += [
    {"kernel": kernel, "arch": "gfx942", "head_dim": 128, "group": 4, "bits": (3, 8)}
    for kernel in ("portable", "combine")
]


@pytest.mark.parametrize("name", MERGES)
def test_merge(name: str) -> None:
    got = report(MERGES[name])
    assert (got["order"][0] >= 0) == (MERGES[name]["arch"] >= 90), "it waits for the splits"
    assert got["spills"] == 0
    assert got["shared"] <= 75 * 1024, "three programs to a multiprocessor"
    if name == "more splits than at once":
        assert got["registers"] <= 128, "two programs to a multiprocessor"
    count = Counter(got["all"])
    if "many rows" in name and MERGES[name]["head_dim"] > 32:
        assert count["HMMA"] and count.total() - count["NOP"] <= 900, "the product is on tensor cores"
        assert got["shared"] <= 8 * 1024, "for the merged queries only"


@pytest.mark.parametrize("case", PORTABLE, ids=str)
def test_portable(case: dict) -> None:
    got = report(case)
    assert got["spills"] == 0
    assert got["shared"] <= 48 * 1024


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_query_and_combine(case: dict) -> None:
    got = report(case)
    assert got["spills"] == 0
    assert got["shared"] <= 96 * 1024
    if case.get("gluon") and case["arch"] >= 90:
        assert 0 <= got["order"][0] < got["order"][1] < got["order"][2], "it waits, lets the next launch begin, reads"


@pytest.mark.parametrize("case", AMD, ids=str)
def test_the_portable_path_compiles_for_amd(case: dict) -> None:
    assert report(case)["code"] > 0


if __name__ == "__main__":
    print(json.dumps([_report(case) for case in json.loads(sys.argv[1])]))
