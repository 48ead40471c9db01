"""Fine-tuning of LLaMA-class models: 4-bit base sharded by ZeRO-3, adapters on the query and value projections."""

import logging

__version__ = "0.1.0"

# At its import, which comes before any command, it recommends a package on some CPUs: once in every process.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
