"""Encode, prepare and extend kernels compiled to cubins without a GPU, for Ampere, Ada, Hopper and Blackwell.

The loops of block sizes that were measured must not spill, and all must fit the shared memory of their chip.  The
full product of kernels, bits, head dims and chips takes many minutes: the main configurations are compiled always, and
each run draws others from the product with its seed.  Compilation runs in child processes, where Triton is not
interpreting.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB of a multiprocessor, a program may have all but one
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")  # of mma.sync, wgmma and tcgen05
COMPILER = ("num_warps", "num_stages")
TYPES = {
    "words": "*i32", "k_words": "*i32", "v_words": "*i32", "length": "*i64", "start": "*i64", "scale": "fp32",
    "k_factor": "fp32", "v_factor": "fp32", "softcap": "fp32", "scales": "*fp16", "k_scales": "*fp16",
    "v_scales": "*fp16", "rotated": "*fp16",
}  # fmt: skip
TYPES |= dict.fromkeys("operands x q ring k v k_new v_new k_sinks v_sinks k_recent v_recent".split(), "*bf16")
TYPES |= dict.fromkeys(
    "map shift feedback key_map value_map key_feedback value_feedback unit bias out lse query_map key_shift output_map "
    "value_shift o_exact lse_exact o_packed lse_packed".split(),
    "*fp32",
)

MAIN = [
    *({"kernel": "encode", "dim": 128, "bits": [b, b], "arch": 90, "key": b % 2 == 1} for b in (2, 3, 4)),
    {"kernel": "encode", "dim": 64, "bits": [3, 3], "arch": 90, "key": True},
    {"kernel": "encode", "dim": 128, "bits": [3, 3], "arch": 80, "key": True},
    {"kernel": "step", "dim": 128, "bits": [3, 2], "arch": 90, "key": True},
    {"kernel": "packed", "dim": 128, "bits": [3, 3], "arch": 90, "key": True},
    {"kernel": "packed", "dim": 64, "bits": [4, 2], "arch": 90, "key": True},
    {"kernel": "packed", "dim": 128, "bits": [3, 3], "arch": 80, "key": True},
    {"kernel": "exact", "dim": 128, "bits": [3, 3], "arch": 90, "key": True},
    {"kernel": "exact", "dim": 128, "bits": [3, 3], "arch": 90, "key": True, "small_grid": True},
    {"kernel": "merge", "dim": 256, "bits": [3, 3], "arch": 90, "key": True},
    *(
        {"kernel": "encode", "dim": 128, "bits": [b, b], "arch": 90, "key": b % 2 == 1, "feedback": True}
        for b in (2, 3, 4)
    ),
    {"kernel": "encode", "dim": 64, "bits": [3, 3], "arch": 90, "key": False, "feedback": True},
    {"kernel": "step", "dim": 128, "bits": [3, 2], "arch": 90, "key": True, "feedback": True},
]
FIT = [  # chips on which the map of D = 256 stays in shared memory, on which it does not, and every kernel on each path
    {"kernel": "encode", "dim": 256, "bits": [3, 3], "arch": 90, "key": False},
    {"kernel": "encode", "dim": 256, "bits": [3, 3], "arch": 89, "key": True},
    {"kernel": "encode", "dim": 128, "bits": [3, 3], "arch": 120, "key": False},
    *(
        {"kernel": kernel, "dim": dim, "bits": [3, 3], "arch": arch, "key": False, "feedback": True}
        for kernel, dim, arch in [("encode", 256, 90), ("encode", 256, 89), ("encode", 128, 89), ("step", 256, 89)]
    ),
    *(
        {"kernel": kernel, "dim": dim, "bits": [3, 3], "arch": 100, "key": True, "feedback": True}
        for kernel, dim in [("encode", 128), ("step", 64)]
    ),
    *(
        {"kernel": kernel, "dim": dim, "bits": [3, 3], "arch": arch, "key": True}
        for arch in (89, 100)
        for kernel, dim in [("packed", 128), ("exact", 64), ("rotate", 64), ("merge", 64), ("write", 64)]
    ),
    *({"kernel": "operands", "dim": 256, "bits": [3, 3], "arch": a, "key": False, "feedback": True} for a in (80, 90)),
    {"kernel": "operands", "dim": 128, "bits": [3, 3], "arch": 90, "key": True},
    *({"kernel": "whole", "dim": 256, "bits": [3, 3], "arch": 90, "key": key} for key in (False, True)),
    {"kernel": "whole", "dim": 256, "bits": [3, 3], "arch": 90, "key": False, "feedback": True},
    {"kernel": "encode", "dim": 256, "bits": [3, 3], "arch": 90, "key": True, "rest": True},
    {"kernel": "exact", "dim": 288, "bits": [3, 3], "arch": 89, "key": True},
    *(
        {"kernel": kernel, "dim": dim, "bits": [3, 3], "arch": arch, "key": True, "dtype": "float32"}
        for kernel, dim, arch in [("packed", 256, 89), ("packed", 160, 120), ("packed", 256, 80), ("exact", 256, 89)]
    ),
]


def drawn(seed: int) -> list[dict]:
    """One configuration of every kernel, two of those that depend most on the bits."""
    generator = random.Random(seed)

    def case(kernel: str, k: int = 3, v: int = 3) -> dict:
        dim, arch = generator.choice([64, 96, 128, 256]), generator.choice([80, 89, 90, 100])
        key, feedback = (generator.random() < 0.5 for _ in range(2))
        feedback &= kernel in ("encode", "step", "operands")
        return {"kernel": kernel, "dim": dim, "bits": [k, v], "arch": arch, "key": key, "feedback": feedback}

    keys, values = (generator.sample([1, 2, 3, 4, 8], 2) for _ in range(2))
    cases = [case("encode", b, b) for b in keys]
    cases += [case("packed", k, v) for k, v in zip(keys, values, strict=True)]
    bits = generator.choice([1, 2, 4, 8])
    whole = case("whole", bits, bits) | {"dim": 256, "arch": 90, "feedback": generator.random() < 0.5}
    others = [case(kernel) for kernel in ("rotate", "exact", "merge", "write", "operands")]
    return cases + others + [case("step", 8, 1), whole]


def _compile(case: dict):
    """Compile one kernel with the constants and options its launcher would use."""
    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from tq_ao.codebook import codebook
    from tq_ao.kernels import append, encode, encode_gluon, extend_attention, levels, operands

    dim, (k_bits, v_bits), arch = case["dim"], case["bits"], case["arch"]
    key, value = codebook(k_bits), codebook(v_bits)
    constants = {"D": dim, "DP": encode.padded_dim(dim), "OPERAND": tl.bfloat16, "KC": 32, "PDL": arch >= 90}
    options = {"num_warps": 4, "num_stages": 1}
    optional = ()
    if case["kernel"] in ("encode", "whole", "operands", "step", "write"):
        module = {"encode": encode, "operands": operands}.get(case["kernel"], append)
        gluon = case["kernel"] == "whole"
        fn = encode_gluon.gluon_encode_kernel if gluon else getattr(module, f"{case['kernel']}_kernel")
        if case["kernel"] == "operands":
            options = {"num_warps": operands.WARPS, "num_stages": 1}
        elif case["kernel"] == "encode":
            options = encode.launch_options(dim, SHARED[arch], case.get("feedback", False), case.get("rest", False))
        constants |= {
            "BITS": k_bits, "KEY": case["key"], "STEP": key.step, "RING": case["key"], "Q": 1,
            "FEEDBACK": case.get("feedback", False),
            "ROWS": operands.ROWS, "K_BITS": k_bits, "V_BITS": v_bits, "K_STEP": key.step, "V_STEP": value.step,
        }  # fmt: skip
        optional = () if case["key"] or case["kernel"] not in ("encode", "whole") else ("ring", "length", "start")
        if not case.get("feedback"):
            optional = (*optional, "feedback", "key_feedback", "value_feedback")
    else:
        fn = getattr(extend_attention, f"{case['kernel']}_kernel")
        dtype = getattr(torch, case.get("dtype", "bfloat16"))
        k_type, v_type, exact_type = extend_attention.operand_types(dtype, False)
        constants |= {
            "K_BITS": k_bits, "V_BITS": v_bits, "K_ASM": levels.levels_asm(k_bits, True, k_type),
            "V_ASM": levels.levels_asm(v_bits, False, v_type), "CAP": False, "LOGITS": False,
            "V_OPERAND": getattr(tl, str(v_type).removeprefix("torch.")),
            "PRECISION": extend_attention.product_precision(dtype, dim, SHARED[arch], tf32=True),
        }  # fmt: skip
        small_grid = case.get("small_grid", False)
        options = extend_attention.launch_options(dim, 4096, dtype, SHARED[arch], small_grid)[case["kernel"]]
        if case["kernel"] == "exact":
            constants["OPERAND"] = getattr(tl, str(exact_type).removeprefix("torch."))
        optional = ("sink_logits",)
    constants |= dict.fromkeys(optional)
    constants |= {n: options[n] for n in options if n not in COMPILER}
    constants |= {n: 1 for n in fn.arg_names if n.endswith("_sd")}  # contiguous vectors
    constants = {n: c for n, c in constants.items() if n in fn.arg_names}
    types = TYPES | ({"q": "i32"} if case["kernel"] == "step" else {})  # the number of tokens, not queries
    if case.get("dtype") == "float32":
        types |= dict.fromkeys("rotated q k_new v_new k_sinks v_sinks k_recent v_recent".split(), "*fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in fn.arg_names}
    aligned = [i for i, n in enumerate(fn.arg_names) if signature[n].startswith("*") or re.search("_s[bhnt]$", n)]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[fn.arg_names[i]] != "constexpr"}
    make = GluonASTSource if case["kernel"] == "whole" else ASTSource
    source = make(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    options = {n: options[n] for n in COMPILER if n in options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _loops(sass: str) -> list[list[str]]:
    """Instructions of every loop that has a matrix product."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            body = [t for a, t in code if int(target[1], 16) <= a <= at]
            if re.search(rf"\b(?:{'|'.join(PRODUCTS)})\b", " ".join(body)):
                loops.append(body)
    return loops


def _count(pattern: str, body: list[str]) -> int:
    return sum(bool(re.search(rf"\b(?:{pattern})\b", text)) for text in body)


def _report(case: dict) -> dict:
    """Compile and disassemble one case."""
    import torch
    import triton

    compiled = _compile(case)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("LDL", "STL", "HFMA2", "I2F", *PRODUCTS)}
    count["waits"] = sass.count("WARPGROUP.DEPBAR")
    loops = _loops(sass)
    # Spills inside loops cost time, the few before them do not.
    count["loop_spills"] = sum(_count("LDL|STL", body) for body in loops)
    fast = [body for body in loops if _count("LDGSTS", body)]  # copies ahead of their use
    if fast:
        body = min(fast, key=len)
        count |= {"loop": len(body), "loop_stores": _count("STS|STSM", body), "loop_barriers": _count("BAR", body)}
        count["loop_waits"] = sum("WARPGROUP.DEPBAR" in text for text in body)
    if case["kernel"] == "packed":  # keys and values of a block, in the loop and after it, of one thread
        from tq_ao.kernels import extend_attention

        dtype = getattr(torch, case.get("dtype", "bfloat16"))
        options = extend_attention.launch_options(case["dim"], 4096, dtype, SHARED[case["arch"]])["packed"]
        count["level_pairs"] = 2 * options["TILES"] * extend_attention.padded_dim(case["dim"]) // options["num_warps"]
    count["order"] = [sass.find(f" {op}") for op in ("ACQBULK", "PREEXIT", "LDG")]
    memory = {"shared": compiled.metadata.shared, "tensor": compiled.metadata.tmem_size or 0}
    return {"feedback": False} | case | count | memory | {"instructions": sass.count(";")}


@pytest.fixture(scope="module")
def reports(seed: int) -> list[dict]:
    """Reports of the main and the drawn cases, compiled by two child processes."""
    cases = MAIN + FIT + drawn(seed)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, json.dumps(cases[i::2])],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for i in range(2)
    ]  # fmt: skip
    out = []
    for child in children:
        stdout, stderr = child.communicate(timeout=900)
        assert child.returncode == 0, stderr[-3000:]
        out += json.loads(stdout.splitlines()[-1])
    assert len(out) == len(cases)
    return out


def test_every_kernel_fits_its_chip(reports: list[dict]) -> None:
    for report in reports:
        assert report["shared"] <= 1024 * (SHARED[report["arch"]] - 1), report
        assert report["tensor"] <= 512, report  # columns of the memory that tcgen05 accumulates in


def test_kernels_that_begin_early_wait_for_the_one_before(reports: list[dict]) -> None:
    """And `encode_kernel` before it lets the next one, `gluon_encode_kernel`, begin, which reads without a wait."""
    waiting = [r for r in reports if r["kernel"] in ("encode", "whole", "rotate") and r["arch"] >= 90]
    assert {report["kernel"] for report in waiting} == {"encode", "whole", "rotate"}
    for report in waiting:
        assert report["order"][0] > 0, report
        if report["kernel"] == "encode":
            assert report["order"][0] < report["order"][1] < report["order"][2], report


def test_measured_configurations_do_not_spill_in_their_loop(reports: list[dict]) -> None:
    main = [r for r in reports if any(all(r.get(k) == case[k] for k in case) for case in MAIN)]
    assert len(main) >= len(MAIN)
    for report in main:
        assert report["loop_spills"] <= 8, report  # a few addresses, of more than a thousand instructions


def test_other_configurations_spill_little(reports: list[dict]) -> None:
    for report in reports:
        if report.get("dtype") == "float32":  # has to run, need not be fast
            continue
        # At D = 256 a thread has 128 numbers, and words of the first half of a block: at 8 bits 64 of them.  On sm_80
        # eight warps leave half the registers to a thread; on sm_100, never measured, sums are copied to them.
        crowded = max(report["bits"]) == 8 or report["arch"] in (80, 100)
        share = 0.05
        if report["kernel"] in ("encode", "whole") and report["dim"] == 256 and crowded:
            share = 0.12 if report["arch"] == 100 else 0.1  # 10.7 % of values with feedback at 8 bits (Hopper 7.8 %)
        if (report["kernel"], report["dim"], report["arch"]) == ("packed", 256, 89) and report["bits"][1] == 8:
            share = 0.06  # 5.4 to 5.6 %, whatever the keys
        assert report["LDL"] + report["STL"] <= share * report["instructions"], report


def test_products_run_on_tensor_cores_and_levels_are_made_two_at_a_time(reports: list[dict]) -> None:
    for report in reports:
        if report["kernel"] not in ("operands", "write") and report.get("dtype") != "float32":
            assert sum(report[op] for op in PRODUCTS) > 0, report
        if report["kernel"] == "packed" and max(report["bits"]) < 8 and report.get("dtype") != "float32":
            assert report["HFMA2"] >= report["level_pairs"], report
            assert report["I2F"] <= 16, report  # divisions of addresses; a conversion of each code would be hundreds


def test_codes_stay_in_the_registers_of_the_product(reports: list[dict]) -> None:
    """Whole prefills at D = 128 on Hopper: the loop over half blocks, 64 numbers to a thread."""
    main = [r for r in reports if (r["kernel"], r["dim"], r["arch"]) == ("encode", 128, 90) and max(r["bits"]) < 8]
    assert len(main) >= 6
    for report in main:
        # Quantising takes 8 to a number, packing 1, and 1 starts the sum with the shift; some is done once for two
        # halves.  Comparing with thresholds and gathering codes took 23 to 35.
        # Feedback takes 2 more (the error of half the numbers, in bf16, and halves that are reduced one by one), and no
        # more stores: the error goes from the accumulator of one product into the next in registers.
        assert report["loop"] <= (17 if report.get("feedback") else 15) * 64, report
        # Scales, and what else is done once for two halves; codes would take 16 and more.
        assert report["loop_stores"] <= 8 and report["loop_barriers"] <= 6, report
        # One for each product and one of tokens: ptxas may run the parts of a product one by one, waiting for each.
        assert report["loop_waits"] <= 3, report
        # Two programs to a multiprocessor, so that one quantises while the other multiplies.
        assert report["shared"] <= 113 * 1024, report


def test_whole_blocks_of_256_dims_are_encoded_by_two_warp_groups(reports: list[dict]) -> None:
    whole = [r for r in reports if r["kernel"] == "whole"]
    assert len(whole) >= 4
    for report in whole:
        assert report["HGMMA"] == 2 * (24 if report["feedback"] else 17), report  # 16 steps, and feedback or the shift
        assert report["waits"] == 2 * (2 if report["feedback"] else 1), report  # one for each product
        if not report["feedback"]:
            assert report["LDL"] + report["STL"] == 0, report
            assert report["instructions"] <= 2 * 2200, report  # of which 1300 to a half block, 128 numbers to a thread


def test_the_loop_over_packed_tiles_is_short(reports: list[dict]) -> None:
    for report in reports:
        if report["kernel"] == "packed" and (report["dim"], report["arch"], report["bits"]) == (128, 90, [3, 3]):
            assert report["loop"] <= 1300, report  # of which 500 are softmax; look-ups took 1440 to 1460


if __name__ == "__main__":
    print(json.dumps([_report(case) for case in json.loads(sys.argv[1])]))
