"""Other libraries' ways of running a model, and their names for its places. Importing this imports none of them."""
