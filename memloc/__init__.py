"""memloc: find where a language model keeps what it has memorized. It looks and never writes a weight."""
