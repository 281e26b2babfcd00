"""Data as tensors and batches of them: loading, splits, tables, binarization, dequantization, checks."""

from pyro_vae.data.batches import Batches, as_source
from pyro_vae.data.checks import check
from pyro_vae.data.disk import OnDisk
from pyro_vae.data.loading import Splits, load
from pyro_vae.data.sets import InMemory, to_float
from pyro_vae.data.tables import decode

__all__ = ["Batches", "InMemory", "OnDisk", "Splits", "as_source", "check", "decode", "load", "to_float"]
