"""Linear attention with one decay per head: RetNet, Lightning, simple GLA and the SSD of Mamba-2."""

from archsearch_kernels.scalar_decay.reference import scalar_decay as scalar_decay
from archsearch_kernels.scalar_decay.reference import scalar_decay_recurrent as scalar_decay_recurrent
from archsearch_kernels.scalar_decay.reference import scalar_decay_step as scalar_decay_step
