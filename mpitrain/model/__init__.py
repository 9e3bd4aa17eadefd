"""The network itself: BERT as a list of blocks that know nothing of ranks."""
