"""Fine-tuning of LLaMA-class models: 4-bit base sharded by ZeRO-3, adapters on the query and value projections."""

__version__ = "0.1.0"
