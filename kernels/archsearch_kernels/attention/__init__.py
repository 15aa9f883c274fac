"""Causal softmax attention: grouped queries, sliding window, learned sink, packed documents."""

from archsearch_kernels.attention.reference import attention as attention
from archsearch_kernels.attention.reference import attention_recurrent as attention_recurrent
