"""The lab: a small language model trained here, in about a minute, whose memories are known."""
