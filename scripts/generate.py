#!/usr/bin/env python3
"""Generate from a converted model, as the installed command tq-ao-generate does: the code is tq_ao/generate_cli.py.

python scripts/generate.py DIR --prompt "Once upon a time"
"""

import sys

from tq_ao.generate_cli import main

if __name__ == "__main__":
    sys.exit(main(program="python scripts/generate.py"))
