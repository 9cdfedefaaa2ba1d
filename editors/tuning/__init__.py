"""What gradient editors share: what may move, what must stay, and when it is enough."""
