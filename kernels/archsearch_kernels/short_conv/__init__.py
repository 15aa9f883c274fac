"""Causal depthwise convolution over a few tokens."""

from archsearch_kernels.short_conv.reference import short_conv as short_conv
from archsearch_kernels.short_conv.reference import short_conv_recurrent as short_conv_recurrent
