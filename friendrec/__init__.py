"""friendrec: friend recommendation on TorchRec, from a Parquet log to evaluated recommendations."""

__version__ = "0.1.0"
