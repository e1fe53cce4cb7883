"""Imported by scripts before anything imports torchao: keeps what torchao says about itself out of their output.

Without CUDA it would try its CUDA libraries and warn that it failed; with any torch of today it registers enums
torch no longer needs to be told of.  Every other record of the same loggers passes.
"""

import logging
import os
from collections.abc import Callable

import torch


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in str(record.msg)


if torch.version.cuda is None:
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for _logger, _words in (
    ("torchao", "Skipping import of cpp extensions due to TORCHAO_FORCE_SKIP_LOADING_SO_FILES"),
    ("torch.utils._pytree", "is an Enum subclass"),
):
    logging.getLogger(_logger).addFilter(_without(_words))
