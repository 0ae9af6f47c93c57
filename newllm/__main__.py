"""``python -m newllm``: the command line."""

import sys

from newllm.cli import main

sys.exit(main())
