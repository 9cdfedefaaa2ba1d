"""What rewriters of facts share: keys, values and closed forms."""
