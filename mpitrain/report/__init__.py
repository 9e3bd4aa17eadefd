"""What there is to see of runs: a page that needs nothing else, and its figures."""
