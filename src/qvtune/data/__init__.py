"""Rows of text -> tokens with a label mask -> packed rows -> batches in a resumable order."""

IGNORE_INDEX = -100
"""The label of a position that has no loss (the default of ``torch.nn.functional.cross_entropy``)."""
