"""How bytes move: tensors as MPI buffers, our own ring, gradients in buckets."""
