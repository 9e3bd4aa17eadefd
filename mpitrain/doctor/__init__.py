"""Is this MPI healthy, before it burns hours."""
