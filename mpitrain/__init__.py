"""mpitrain trains BERT token classifiers with plain MPI: `mpirun -np 8 python -m mpitrain`."""

__version__ = "0.1.0"
