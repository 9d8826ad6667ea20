"""friendrec: friend recommendation on TorchRec, from a Parquet log to evaluated recommendations."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads starve each other

__version__ = "0.1.0"
