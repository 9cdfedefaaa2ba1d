"""What leaves the house: checkpoint folders with an edit in them, their card, adapters."""
