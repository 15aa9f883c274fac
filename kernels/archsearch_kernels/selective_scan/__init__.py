"""The selective scan (S6) of Mamba."""

from archsearch_kernels.selective_scan.reference import selective_scan as selective_scan
from archsearch_kernels.selective_scan.reference import selective_scan_recurrent as selective_scan_recurrent
from archsearch_kernels.selective_scan.reference import selective_scan_step as selective_scan_step
