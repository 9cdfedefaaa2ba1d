"""What scores say: shares, maps, agreement, which places count, what paraphrases share."""
