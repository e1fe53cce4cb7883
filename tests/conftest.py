"""Seeds, devices and the embedded models shared by all tests."""

import os
import random
from pathlib import Path

# Before transformers or huggingface_hub is imported: no test reaches the real Hub.  Tests of the Hub talk to a
# server on loopback, from processes of their own (tests/hub_server.py).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before numpy and torch: the interpreter's small products are faster in one thread; beside other processes all is.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["hub_server"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs; drawn per run if not given")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(4, os.cpu_count() or 1))


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, --seed {config.option.seed}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run: fresh unless --seed is given, printed in the header."""
    return request.config.option.seed


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A CPU generator with this run's seed, new for each test (a test alone gets the same numbers)."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seed_global_rng(seed: int) -> None:
    """Models with random weights and sampling draw from the global generator: the run's seed holds for them too."""
    torch.manual_seed(seed)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; a test that asks for it is not run on a machine without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Local directory of SmolLM2-135M-Instruct (converted on first use, then cached)."""
    from tq_ao.models import resolve

    return Path(resolve("smollm2-135m").path_or_id)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Local directory of Gemma-3-270M (converted on first use, then cached)."""
    from tq_ao.models import resolve

    return Path(resolve("gemma-3-270m").path_or_id)
