"""Components silenced, replaced or changed while a model runs; gates on them, learned and greedy."""
