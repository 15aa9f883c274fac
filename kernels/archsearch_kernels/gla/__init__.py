"""Gated linear attention: one decay per key feature and token."""

from archsearch_kernels.gla.reference import gla as gla
from archsearch_kernels.gla.reference import gla_recurrent as gla_recurrent
from archsearch_kernels.gla.reference import gla_step as gla_step
