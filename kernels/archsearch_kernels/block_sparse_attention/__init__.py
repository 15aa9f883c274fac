"""Mixture of block attention: each query reads its own block and the past blocks whose mean key fits it best."""

from archsearch_kernels.block_sparse_attention.reference import block_means as block_means
from archsearch_kernels.block_sparse_attention.reference import block_sparse_attention as block_sparse_attention
from archsearch_kernels.block_sparse_attention.reference import (
    block_sparse_attention_recurrent as block_sparse_attention_recurrent,
)
