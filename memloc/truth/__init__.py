"""Known answers: models whose memory is where we put it, to hold localizers to."""
