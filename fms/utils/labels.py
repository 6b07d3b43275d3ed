"""The label that does not count, which data sets write and losses pass over."""

IGNORED = -100  # torch's own default: cross_entropy(ignore_index=-100)
