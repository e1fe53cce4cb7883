#!/usr/bin/env python3
"""Convert a model, as the installed command tq-ao-convert does: the code is tq_ao/convert_cli.py.

python scripts/convert.py gemma-2b --schedule auto
"""

import sys

from tq_ao.convert_cli import main

if __name__ == "__main__":
    sys.exit(main(program="python scripts/convert.py"))
