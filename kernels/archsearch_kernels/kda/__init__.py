"""Kimi delta attention: the delta rule with one decay per key feature and token."""

from archsearch_kernels.kda.reference import kda as kda
from archsearch_kernels.kda.reference import kda_recurrent as kda_recurrent
from archsearch_kernels.kda.reference import kda_step as kda_step
