"""What parts say, read through the unembedding: lenses, attribution, keys and values, rarity, spectra."""
