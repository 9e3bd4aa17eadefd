"""Being a good MPI program: start, agree, end together."""
