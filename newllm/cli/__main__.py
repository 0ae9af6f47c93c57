"""``python -m newllm.cli``, which torchrun starts."""

import sys

from newllm.cli import main

sys.exit(main())
